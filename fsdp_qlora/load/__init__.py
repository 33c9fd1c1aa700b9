"""How weights come in: from safetensors into shards."""
