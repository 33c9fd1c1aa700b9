"""How a step is distributed and executed: sharding, offload, recomputation, compilation."""
