"""What looks at saved models and changes nothing."""
