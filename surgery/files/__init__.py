"""Saved models: formats and atomic writing. Reading imports no JAX."""
