"""Studies of what the method promises: formats, QLoRA, LoRA and full fine-tuning, forgetting, little data."""
