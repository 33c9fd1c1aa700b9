"""Quantized weights: formats on bitsandbytes' kernels, packed so that FSDP2 can shard them."""
