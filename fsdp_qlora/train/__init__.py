"""Training: step, evaluation and the loop. Knows an nn.Module and batches; nothing of quantization, Hydra or W&B."""
