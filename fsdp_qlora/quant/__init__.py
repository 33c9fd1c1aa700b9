"""How a weight is small: 4-bit formats on bitsandbytes' kernels, packed so that FSDP2 can shard them."""
