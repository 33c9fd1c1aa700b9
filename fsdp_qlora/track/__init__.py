"""What is seen of a run: its folder, metrics.jsonl, the console, Weights & Biases."""
