"""What a run exports: a plain PEFT adapter, and the base model in 4 bits."""

from fsdp_qlora.files import hub_kernels  # noqa: F401  (before PEFT and bitsandbytes)
