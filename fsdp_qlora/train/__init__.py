"""The work: objective, step, evaluation and the loop. Knows an nn.Module and batches; no quantization, Hydra or W&B."""
