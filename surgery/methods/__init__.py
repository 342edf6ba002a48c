"""How several tensors become one."""
