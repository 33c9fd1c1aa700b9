"""What a step would take: the real model code under fake tensors, every allocation counted, nothing allocated."""
