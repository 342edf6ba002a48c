"""Recipes: many changes said in one file, planned, and done in one pass."""
