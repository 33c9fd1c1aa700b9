"""Weight loading: from safetensors files into shards."""
