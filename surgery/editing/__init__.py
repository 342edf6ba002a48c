"""Changed tensors, put into a checkpoint without computing them yet."""
