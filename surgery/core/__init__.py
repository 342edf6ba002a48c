"""The words of the library, without arrays: nothing here imports JAX."""
