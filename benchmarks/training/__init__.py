"""Models for `train_step.py`, as users of several libraries write them."""
