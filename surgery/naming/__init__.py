"""What tensors are called, and which of them are meant."""
