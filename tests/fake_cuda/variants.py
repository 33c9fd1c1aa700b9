"""The variants that are walked: every format, optimizer, offload, batch, checkpointing, sharding and attention."""

from __future__ import annotations

from typing import Any

from fsdp_qlora.config.choices import OPTIMIZERS
from tests.fake_cuda.faults import PLANTS
from tests.fake_cuda.pairs import ON_HOST
from tests.fake_cuda.variant import Variant

FAST = ("2 ranks", "1 rank", "flat, varlen", "offload params", "offload params, 1 rank")
"""The variants of `make test`; all others are walked in the full tier."""
Group = dict[str, Any]


def _with(
    quant: Group | None = None, fsdp: Group | None = None, optim: str = "", checkpointing: str = "",
    attention: str = "", lora: Group | None = None, precision: str = "", train: Group | None = None, **walk: Any,
) -> Variant:  # fmt: skip
    groups = {
        "quant": quant,
        "fsdp": fsdp,
        "optim": {"name": optim} if optim else None,
        "train": {"activation_checkpointing": checkpointing} if checkpointing else train,
        "model": {"attn_implementation": attention} if attention else None,
        "lora": lora,
        "precision": {"name": precision} if precision else None,
    }
    return Variant(settings={name: values for name, values in groups.items() if values}, **walk)


_ON_HOST = {"offload_modules": ON_HOST}
_LIGER: dict[str, Group] = {
    "2 ranks": {},
    "1 rank": {"world_size": 1},
    "flat, varlen": {"batch": "flat", "attention": "varlen", "rows": 2},
}
VARIANTS: dict[str, Variant] = {
    "2 ranks": _with(),
    "1 rank": _with(world_size=1),
    "2 x 2 ranks": _with(world_size=4, fsdp={"replicate_degree": 2}),
    "packed, sdpa": _with(batch="packed", attention="sdpa"),
    "packed, sdpa, 2 sequences": _with(batch="packed", attention="sdpa", rows=2),
    "flat, varlen": _with(batch="flat", attention="varlen", rows=2),
    "flat, varlen, 1 rank": _with(batch="flat", attention="varlen", rows=2, world_size=1),
    "eager": _with(attention="eager"),
    "nf4 without double quantization": _with(quant={"double_quant": False}),
    "blocks of 128": _with(quant={"block_size": 128}),
    "fp4": _with(quant={"name": "fp4"}),
    "int8 with a threshold": _with(quant={"name": "int8", "double_quant": False}),
    "int8": _with(quant={"name": "int8", "double_quant": False, "llm_int8_threshold": 0.0}),
    "16 bit": _with(quant={"name": "none"}),
    "16 bit, 1 rank": _with(quant={"name": "none"}, world_size=1),
    "float32": _with(precision="fp32"),
    "adapters replicated": _with(fsdp={"adapters": "replicated"}),
    "adapters replicated, 2 x 2 ranks": _with(fsdp={"adapters": "replicated", "replicate_degree": 2}, world_size=4),
    "dense weights not cached, 1 rank": _with(quant={"cache_dequantized": "false"}, world_size=1),
    "a copy per rank": _with(fsdp={"replicate_degree": 2}),
    "dense weights cached": _with(quant={"cache_dequantized": "true"}),
    "dense weights not cached": _with(quant={"cache_dequantized": "false"}),
    "layers stay gathered": _with(fsdp={"reshard_after_forward": "false"}),
    "layers are gathered twice": _with(fsdp={"reshard_after_forward": "true"}),
    "prefetch 0": _with(fsdp={"prefetch": 0}),
    "prefetch 2": _with(fsdp={"prefetch": 2}),
    "checkpointing full": _with(checkpointing="full"),
    "checkpointing selective": _with(checkpointing="selective"),
    "offload activations": _with(fsdp={"offload": "activations"}),
    "offload activations, checkpointing full": _with(fsdp={"offload": "activations"}, checkpointing="full"),
    "offload params": _with(fsdp={"offload": "params"}),
    "offload params, 1 rank": _with(fsdp={"offload": "params"}, world_size=1),
    "offload all": _with(fsdp={"offload": "all"}),
    "offload all, 1 rank": _with(fsdp={"offload": "all"}, world_size=1),
    "modules on the host": _with(fsdp=_ON_HOST),
    "modules on the host, 1 rank": _with(fsdp=_ON_HOST, world_size=1),
    "embeddings nf4": _with(quant={"embeddings": "nf4"}),
    "embeddings nf4 without double quantization": _with(quant={"embeddings": "nf4", "double_quant": False}),
    "embeddings int8": _with(quant={"embeddings": "int8", "double_quant": False}),
    "tied": _with(family="tied"),
    "tied, embeddings nf4": _with(family="tied", quant={"embeddings": "nf4"}),
    "dropout": _with(lora={"r": 16, "dropout": 0.1}),
    "experts": _with(family="experts"),
    "experts, 1 rank": _with(family="experts", world_size=1),
    "offload params, adamw_8bit": _with(fsdp={"offload": "params"}, optim="adamw_8bit"),
    **{f"optim {name}": _with(optim=name) for name in OPTIMIZERS if name != "adamw"},
    **{f"lora {name}": _with(lora={"variant": name}) for name in ("dora", "ia3", "vera")},
    **{f"lora {name}, 1 rank": _with(lora={"variant": name}, world_size=1) for name in ("dora", "vera")},
    "kernels compile": _with(train={"kernels": "compile"}),
    "kernels compile, 1 rank": _with(train={"kernels": "compile"}, world_size=1),
    **{f"kernels liger, {name}": _with(train={"kernels": "liger"}, **walk) for name, walk in _LIGER.items()},
    "compile": _with(train={"compile": "true"}),
    "compile, 1 rank": _with(train={"compile": "true"}, world_size=1),
    "compile, kernels compile": _with(train={"compile": "true", "kernels": "compile"}),
    **{f"planted: {name}": Variant(world_size=1, plant=name) for name in PLANTS},
    **{f"planted in generate: {name}": Variant(world_size=1, plant=name, plant_in="generate") for name in PLANTS},
}
