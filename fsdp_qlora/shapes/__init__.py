"""What a model is, in names and numbers."""
