"""Adapters on a checkpoint: sites, weights, and what layers get."""
