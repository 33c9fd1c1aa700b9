"""What is trained: adapters on a frozen base, a file for each method (`method.py` says what a method answers)."""

from fsdp_qlora.adapters.lora import LoRA, RsLoRA
from fsdp_qlora.adapters.method import Method, build_method, method_of, parameters_of, register

__all__ = ["LoRA", "Method", "RsLoRA", "build_method", "method_of", "parameters_of", "register"]
