"""Data pipeline: files -> conversations -> tokens and a loss mask -> batches, the same for any number of ranks."""
