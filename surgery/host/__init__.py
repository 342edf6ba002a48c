"""Plugins: found, loaded when needed, and kept apart."""
