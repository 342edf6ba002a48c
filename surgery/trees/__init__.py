"""Models of any framework: their parameters as verbs know them, and back."""
