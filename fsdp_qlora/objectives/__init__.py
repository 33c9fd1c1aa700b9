"""What the loss is."""
