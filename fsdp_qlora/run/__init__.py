"""One run from start to end: prepare, train, save, export."""

from fsdp_qlora.files import hub_kernels  # noqa: F401  (before PEFT and bitsandbytes)
