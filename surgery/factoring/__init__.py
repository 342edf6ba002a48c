"""The transform `factored`: low-rank values that stay factored."""
