"""Run tracking: metrics.jsonl, the console and Weights & Biases."""
