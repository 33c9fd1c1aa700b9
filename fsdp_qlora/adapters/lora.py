"""PEFT's adapters on a meta model: attach, initialise the same on any number of ranks.

PEFT gives the config, the file format and the adapter modules. Its dispatcher learns our 4-bit layer through
``LoraConfig._register_custom_module`` (private by name; `tests/unit/test_lora.py` says when it breaks).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from fsdp_qlora.adapters.linear import QuantLoraLinear
from fsdp_qlora.adapters.names import trainable_parameters
from fsdp_qlora.distributed.seeds import seed_of
from fsdp_qlora.distributed.shards import fill_slice, local_tensor
from fsdp_qlora.errors import NumericsError
from fsdp_qlora.quant.linear import QuantLinear


def lora_config(
    target_modules: Sequence[str], r: int, alpha: float, dropout: float = 0.0, variant: str = "lora",
    task_type: str | None = "CAUSAL_LM",
) -> LoraConfig:  # fmt: skip
    """Return PEFT's config for the adapters."""
    return LoraConfig(
        task_type=task_type,  # type: ignore[arg-type]
        target_modules=list(target_modules),
        r=r,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        use_rslora=variant == "rslora",
    )


def attach_lora(
    model: PreTrainedModel, target_modules: Sequence[str], r: int, alpha: float, dropout: float = 0.0,
    variant: str = "lora", task_type: str | None = "CAUSAL_LM",
) -> PeftModel:  # fmt: skip
    """Add LoRA adapters (float32, on meta) to the named linears of a meta model and freeze all else."""
    config = lora_config(target_modules, r, alpha, dropout, variant, task_type)
    config._register_custom_module({QuantLinear: QuantLoraLinear})
    with warnings.catch_warnings():
        # peft warns of a tied embedding that it would have to untie to merge; we neither target nor merge it here
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        warnings.filterwarnings("ignore", message="Unsupported layer type .*QuantLinear")  # it is registered above
        peft_model = get_peft_model(model, config, low_cpu_mem_usage=True)
    assert isinstance(peft_model, PeftModel)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return peft_model


@torch.no_grad()
def initialize_adapters(model: nn.Module, seed: int, shard_rank: int = 0, shard_size: int = 1) -> None:
    """Initialise the adapters as PEFT does (A uniform as `nn.Linear`, B zero), each from a seed of its own name.

    Each tensor is drawn whole on the CPU and sliced, so the values do not depend on the number of ranks.
    """
    for name, parameter in trainable_parameters(model):
        if ".lora_B." in name:
            local_tensor(parameter).zero_()
            continue
        if ".lora_A." not in name:
            raise NumericsError(f"{name}: no initialisation is known for this trainable parameter.")
        generator = torch.Generator().manual_seed(seed_of(seed, name))
        bound = parameter.shape[1] ** -0.5  # kaiming_uniform_(a=sqrt(5)), PEFT's and nn.Linear's own
        whole = torch.empty(parameter.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
        fill_slice(parameter, whole, shard_rank, shard_size)
