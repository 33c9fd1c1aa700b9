"""Planning: which linears are quantized, how they are sharded, how a batch is split, and the memory it takes."""
