"""How the work is spread: sharding, offload, recomputation, compilation."""
