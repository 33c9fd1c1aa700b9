"""A model's shapes: names and numbers, without weights."""
