"""The transformers model: its folder, config, tokenizer, skeleton on meta, and the FSDP root module."""

from fsdp_qlora.files import hub_kernels  # noqa: F401  (before PEFT and bitsandbytes)
