"""Recipes: many changes in one file, planned, and made in one pass."""
