"""Quantized weights: formats on bitsandbytes' kernels, packed so that FSDP2 can shard them."""

from fsdp_qlora.files import hub_kernels  # noqa: F401  (before PEFT and bitsandbytes)
