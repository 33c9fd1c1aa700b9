"""Adapters on a frozen base, one file per method; `method.py` defines the interface."""

from fsdp_qlora.files import hub_kernels  # noqa: F401  (before PEFT and bitsandbytes)

# isort: split
from fsdp_qlora.adapters import dora, full, peft_methods  # noqa: F401  (register themselves)
from fsdp_qlora.adapters.lora import LoRA, RsLoRA
from fsdp_qlora.adapters.method import Method, build_method, method_of, of_target, parameters_of, register, spelt_out

__all__ = [
    "LoRA",
    "Method",
    "RsLoRA",
    "build_method",
    "method_of",
    "of_target",
    "parameters_of",
    "register",
    "spelt_out",
]
