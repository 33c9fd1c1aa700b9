"""Who we are: processes, meshes and reductions over torch.distributed."""
