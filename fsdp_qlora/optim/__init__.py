"""Optimizers on local shards, and learning-rate schedules as pure functions of the step."""

from fsdp_qlora.files import hub_kernels  # noqa: F401  (before PEFT and bitsandbytes)
