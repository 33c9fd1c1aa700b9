"""Checks that a run computes what the model's authors wrote."""

from fsdp_qlora.files import hub_kernels  # noqa: F401  (before PEFT and bitsandbytes)
