"""What is learned from: files -> conversations -> tokens with a mask -> batches that any number of ranks sees alike."""
