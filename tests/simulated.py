"""Simulates variants on the simulated device: ``python -m tests.simulated FOLDER NAME ...``, one JSON object for each.

In a process of its own, because the device cannot be unregistered. "CHECKS" is no variant: see `device_checks`.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig

from fsdp_qlora.adapters import build_method
from fsdp_qlora.config import choices
from fsdp_qlora.config.auto import as_word
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.run.decide import planned
from fsdp_qlora.simulate.device import accelerator, accelerator_mode
from fsdp_qlora.simulate.step import simulate_here
from tests.build import config_of

Groups = dict[str, Any]
TOKENS = 2 * 512
"""Tokens of a micro-batch."""
VOCABULARY = 8192
LLAMA = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 16,
    "num_key_value_heads": 4, "vocab_size": VOCABULARY, "max_position_embeddings": 4096,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **LLAMA, "tie_word_embeddings": False},
    "tied": {"model_type": "llama", **LLAMA, "tie_word_embeddings": True},
    "deep": {"model_type": "llama", **LLAMA, "num_hidden_layers": 12, "tie_word_embeddings": False},
    "small": {
        "model_type": "llama", **LLAMA, "hidden_size": 448, "intermediate_size": 1536, "num_attention_heads": 7,
        "num_key_value_heads": 7, "num_hidden_layers": 8, "tie_word_embeddings": True,
    },
    "experts": {
        "model_type": "mixtral", **LLAMA, "intermediate_size": 1024, "num_local_experts": 4, "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    },
}  # fmt: skip
SIDES: dict[str, Any] = {
    "d_model": 512, "encoder_layers": 4, "decoder_layers": 4, "encoder_attention_heads": 8,
    "decoder_attention_heads": 8, "encoder_ffn_dim": 2048, "decoder_ffn_dim": 2048,
}  # fmt: skip
OBJECTIVES: dict[str, tuple[dict[str, Any], Groups]] = {
    "bert, labels": (
        {"model_type": "bert", "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4,
         "num_attention_heads": 8, "vocab_size": VOCABULARY},
        {"objective": {"name": "sequence_classification", "labels": ["a", "b"]}},
    ),
    "bert, words": (
        {"model_type": "bert", "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
         "num_attention_heads": 8, "vocab_size": VOCABULARY},
        {"objective": {"name": "token_classification", "labels": ["a", "b"]}},
    ),
    "bert, masks": (
        {"model_type": "bert", "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4,
         "num_attention_heads": 8, "vocab_size": VOCABULARY, "architectures": ["BertForMaskedLM"]},
        {"objective": {"name": "masked_lm"}},
    ),
    "albert, masks": (
        {"model_type": "albert", "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6,
         "num_attention_heads": 8, "embedding_size": 128, "vocab_size": VOCABULARY,
         "architectures": ["AlbertForMaskedLM"]},
        {"objective": {"name": "masked_lm"}},
    ),
    "bert, pairs": (
        {"model_type": "bert", "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4,
         "num_attention_heads": 8, "vocab_size": VOCABULARY},
        {"objective": {"name": "embedding"}},
    ),
    "llama, labels": (
        {"model_type": "llama", **LLAMA, "pad_token_id": 0},
        {"objective": {"name": "sequence_classification", "labels": ["a", "b"]}},
    ),
    "llama, pairs": (
        {"model_type": "llama", **LLAMA, "pad_token_id": 0}, {"objective": {"name": "embedding"}},
    ),
    "t5": (
        {"model_type": "t5", "d_model": 512, "d_ff": 2048, "d_kv": 64, "num_layers": 4, "num_heads": 8,
         "vocab_size": VOCABULARY, "decoder_start_token_id": 0},
        {"objective": {"name": "seq2seq"}},
    ),
    "t5, deep": (
        {"model_type": "t5", "d_model": 512, "d_ff": 2048, "d_kv": 64, "num_layers": 10, "num_heads": 8,
         "vocab_size": VOCABULARY, "decoder_start_token_id": 0},
        {"objective": {"name": "seq2seq", "max_target_length": 512}},
    ),
    "bart": (
        {"model_type": "bart", **SIDES, "max_position_embeddings": 1024, "vocab_size": VOCABULARY},
        {"objective": {"name": "seq2seq"}},
    ),
    "marian": (
        {"model_type": "marian", **SIDES, "max_position_embeddings": 512, "vocab_size": VOCABULARY,
         "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1},
        {"objective": {"name": "seq2seq", "max_target_length": 512}},
    ),
    "whisper": (
        {"model_type": "whisper", **SIDES, "vocab_size": VOCABULARY, "pad_token_id": 0},
        {"objective": {"name": "seq2seq"}},
    ),
    "vit": (
        {"model_type": "vit", "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4,
         "num_attention_heads": 8},
        {"objective": {"name": "image_classification", "labels": ["a", "b"]}},
    ),
    "dinov2": (
        {"model_type": "dinov2", "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6,
         "image_size": 224},
        {"objective": {"name": "image_classification", "labels": ["a", "b"]}},
    ),
    "swin": (
        {"model_type": "swin"}, {"objective": {"name": "image_classification", "labels": ["a", "b"]}},
    ),
}  # fmt: skip
"""Models of other objectives, none of which has weights, and their settings."""
ON_HOST = {"fsdp": {"offload_modules": ["head", "embeddings", "norms"]}}

WHOLE = {"quant": {"name": "none"}, "lora": {"variant": "none"}}


def _offload(which: str, **groups: Any) -> Groups:
    return {"fsdp": {"offload": which}, **groups}


VARIANTS: dict[str, Groups] = {
    "2 ranks": {},
    "1 rank": {"ranks": 1},
    "1 rank, int8 too": {"ranks": 1, "quant": {"overrides": {"*.down_proj": "int8", "*.0.self_attn.*": "none"}}},
    "1 rank, experts": {"ranks": 1, "family": "experts"},
    "1 rank, deep": {"ranks": 1, "family": "deep"},
    "1 rank, dense weights not cached": {"ranks": 1, "quant": {"cache_dequantized": "false"}},
    "1 rank, float32": {"ranks": 1, "precision": {"name": "fp32"}},
    "a copy per rank": {"fsdp": {"replicate_degree": 2}},
    "3 ranks": {"ranks": 3},
    "2 x 2 ranks": {"ranks": 4, "fsdp": {"replicate_degree": 2}},
    "params": _offload("params"),
    "params, 1 rank": _offload("params", ranks=1),
    "params, 1 rank, deep": _offload("params", ranks=1, family="deep"),
    "params, 1 rank, tied": _offload("params", ranks=1, family="tied"),
    "params, 1 rank, full": _offload("params", ranks=1, train={"activation_checkpointing": "full"}),
    "params, 1 rank, prefetch 2": {"ranks": 1, "fsdp": {"offload": "params", "prefetch": 2}},
    "params, 1 rank, prefetch 0": {"ranks": 1, "fsdp": {"offload": "params", "prefetch": 0}},
    "params, deep": _offload("params", family="deep"),
    "params, tied": _offload("params", family="tied"),
    "params, experts": _offload("params", family="experts"),
    "params, packed": _offload("params", data={"packing": True}),
    "params, embeddings nf4": _offload("params", quant={"embeddings": "nf4"}),
    "params, full": _offload("params", train={"activation_checkpointing": "full"}),
    "params, selective": _offload("params", train={"activation_checkpointing": "selective"}),
    "activations": _offload("activations"),
    "activations, full": _offload("activations", train={"activation_checkpointing": "full"}),
    "all": _offload("all"),
    "all, 1 rank": _offload("all", ranks=1),
    "all, full": _offload("all", train={"activation_checkpointing": "full"}),
    "all, selective": _offload("all", train={"activation_checkpointing": "selective"}),
    "activations, eager": _offload("activations", model={"attn_implementation": "eager"}),
    "activations, experts": _offload("activations", family="experts"),
    "activations, packed": _offload("activations", data={"packing": True}),
    **{
        f"small, {which}{alone}": _offload(which, family="small", data={"max_length": 512}, **ranks)
        for which in ("none", "params", "activations", "all")
        for alone, ranks in (("", {}), (", 1 rank", {"ranks": 1}))
    },
    "modules": ON_HOST,
    "modules, 1 rank": {**ON_HOST, "ranks": 1},
    "modules, 1 rank, deep": {**ON_HOST, "ranks": 1, "family": "deep"},
    "modules, 1 rank, tied": {**ON_HOST, "ranks": 1, "family": "tied"},
    "embeddings on the host, 1 rank, tied": {"family": "tied", "ranks": 1, "fsdp": {"offload_modules": ["embeddings"]}},
    "modules, 1 rank, prefetch 0": {"ranks": 1, "fsdp": {**ON_HOST["fsdp"], "prefetch": 0}},
    "modules, 1 rank, prefetch 2": {"ranks": 1, "fsdp": {**ON_HOST["fsdp"], "prefetch": 2}},
    "modules, deep": {**ON_HOST, "family": "deep"},
    "modules, full": {**ON_HOST, "train": {"activation_checkpointing": "full"}},
    "embeddings on the host, tied": {"family": "tied", "fsdp": {"offload_modules": ["embeddings"]}},
    "head on the host, replicated": {"fsdp": {"adapters": "replicated", "offload_modules": ["head"]}},
    "packed": {"data": {"packing": True}},
    "packed, varlen": {"data": {"packing": True}, "model": {"attn_implementation": "varlen"}},
    "packed, float32": {"data": {"packing": True}, "precision": {"name": "fp32"}},
    "eager": {"model": {"attn_implementation": "eager"}},
    "int8": {"quant": {"name": "int8", "double_quant": False}},
    "fp4": {"quant": {"name": "fp4"}},
    "16 bit": {"quant": {"name": "none"}},
    "not nested": {"quant": {"double_quant": False}},
    "blocks of 1024": {"quant": {"block_size": 1024}},
    "embeddings nf4": {"quant": {"embeddings": "nf4"}},
    "embeddings int8": {"quant": {"embeddings": "int8", "double_quant": False}},
    "tied": {"family": "tied"},
    "tied, embeddings nf4": {"family": "tied", "quant": {"embeddings": "nf4"}},
    "experts": {"family": "experts"},
    "replicated": {"fsdp": {"adapters": "replicated"}},
    "whole base": WHOLE,
    "whole base, alone": {**WHOLE, "ranks": 1},
    "whole base, tied": {**WHOLE, "family": "tied"},
    "whole base, float32": {**WHOLE, "precision": {"name": "fp32"}},
    "whole base, float32, alone": {**WHOLE, "ranks": 1, "precision": {"name": "fp32"}},
    "whole base, recomputed": {**WHOLE, "train": {"activation_checkpointing": "full"}},
    "whole base, experts": {**WHOLE, "family": "experts"},
    "added tokens": {"model": {"add_tokens": ["<|a|>", "<|b|>"]}},
    "added tokens, tied": {"family": "tied", "model": {"add_tokens": ["<|a|>", "<|b|>"]}},
    "full": {"train": {"activation_checkpointing": "full"}},
    "selective": {"train": {"activation_checkpointing": "selective"}},
    "layers are gathered twice": {"fsdp": {"reshard_after_forward": "true"}},
    "dense weights not cached": {"quant": {"cache_dequantized": "false"}},
    "prefetch 0": {"fsdp": {"prefetch": 0, "reshard_after_forward": "true"}},
    "prefetch 2": {"fsdp": {"prefetch": 2, "reshard_after_forward": "true"}},
    "plain": {"debug": {"name": "plain"}},
    "dropout": {"lora": {"dropout": 0.1}},
    "float32": {"precision": {"name": "fp32"}},
    **{f"optim {name}": {"optim": {"name": name}} for name in choices.OPTIMIZERS.shipped if "paged" not in name},
    **{f"params, optim {name}": _offload("params", optim={"name": name}) for name in choices.OPTIMIZERS.shipped},
    **{
        f"lora {name}": {"lora": {"variant": name, "r": 8}}
        for name in choices.PEFT_METHODS
        if build_method(name).simulates
    },
}


FAMILIES |= {f"objective, {name}": settings for name, (settings, _) in OBJECTIVES.items()}
VARIANTS |= {
    f"objective, {name}{where}": {
        "family": f"objective, {name}", **groups, **more, "model": {"attn_implementation": "auto"},
        "quant": {"allow_16bit": True},
    }
    for name, (_, groups) in OBJECTIVES.items()
    for where, more in {
        "": {}, ", CPU": {"plan": {"gpu": None}}, ", full": {"train": {"activation_checkpointing": "full"}},
        ", params": {"fsdp": {"offload": "params"}},
        ", long, full": {"train": {"activation_checkpointing": "full"}, "data": {"max_length": 1536}},
    }.items()
    if where in ("", ", CPU") or name in ("bert, labels", "t5")
}  # fmt: skip


def also_on_cpu(name: str) -> bool:
    """Whether its bytes are those of a CPU: it keeps nothing on the host, and PEFT's layers do not compute it.

    Encoders compute eager attention on a CPU, and sdpa on a device.
    """
    return (
        "lora " not in name
        and "objective" not in name
        and not {"offload", "offload_modules"} & VARIANTS[name].get("fsdp", {}).keys()
    )


def config_and_ranks(folder: Path, name: str, gpu: str | None = "24GiB") -> tuple[RunConfig, int]:
    """Return the settings and the number of ranks of a variant, with two micro-batches a rank."""
    more = dict(VARIANTS[name])
    ranks, family = more.pop("ranks", 2), more.pop("family", "llama")
    if not (folder / family).is_dir():
        settings = dict(FAMILIES[family])
        AutoConfig.for_model(settings.pop("model_type"), **settings).save_pretrained(folder / family)
    groups: Groups = {
        "model": {"attn_implementation": "sdpa"}, "data": {"max_length": 512}, "lora": {"r": 16},
        "train": {"global_batch_size": 4 * ranks, "micro_batch_size": 2}, "plan": {"gpu": gpu},
    }  # fmt: skip
    for group, values in more.items():
        groups[group] = {**groups.get(group, {}), **values}
    groups["model"] |= {"name": str(folder / family)}
    return config_of(str(folder / family), **groups), ranks


def run(folder: Path, name: str) -> dict[str, Any]:
    """Simulate a variant on the device and, if nothing is on the host, on a CPU; and plan it."""
    config, ranks = config_and_ranks(folder, name)
    plan = planned(config, ranks)[2]
    answer: dict[str, Any] = {
        "device": asdict(simulate_here(config, ranks)), "peak": plan.peak, "bytes": asdict(plan.bytes),
        "host": plan.host.in_step, "moved": plan.host.offloaded_activations, "tensors": plan.trainable_parameters,
        "moments": plan.moments,
    }  # fmt: skip
    if also_on_cpu(name):
        here, _ = config_and_ranks(folder, name, None)
        dense = as_word(plan.settings.cache_dequantized)  # a CPU would decide otherwise
        here = replace(here, quant=replace(here.quant, cache_dequantized=dense))
        answer["cpu"] = asdict(simulate_here(here, ranks))
    return answer


def _raised(work: Callable[[], object]) -> str:
    try:
        work()
    except Exception as error:
        return type(error).__name__
    return ""


class _Recorded(TorchDispatchMode):
    """Notes the names of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


def device_checks() -> dict[str, Any]:
    """Return what the device does, outside any mode and in a backward: `test_simulated_device.py` knows the answers."""
    device, bf16 = accelerator(), torch.bfloat16

    def heads(count: int, dtype: torch.dtype = bf16) -> torch.Tensor:
        return torch.empty(2, count, 8, 16, device=device, dtype=dtype, requires_grad=True)

    def kernel(*args: torch.Tensor, **settings: Any) -> str:
        out = torch.nn.functional.scaled_dot_product_attention(*args, **settings)
        out.sum().backward()
        return type(out.grad_fn).__name__

    stream, event = torch.get_device_module(device).Stream(), torch.get_device_module(device).Event()
    with stream:
        stream.record_event(event)
        stream.record_event().synchronize()
    stream.wait_stream(torch.get_device_module(device).current_stream())
    torch.accelerator.current_stream().wait_event(event)
    host = torch.empty(4, device=device).cpu()
    with torch.autograd.set_multithreading_enabled(False):
        answers = {
            "real ones become fake": str(torch.arange(3.0).to(device).device),
            "mixed": _raised(lambda: torch.empty(3, device=device) + torch.zeros(3)),
            "item": _raised(torch.empty(1, device=device).item),
            "host": host.device.type,
            "pinned": (host.is_pinned(), host.pin_memory().is_pinned()),
            "flash": kernel(heads(4), heads(2), heads(2), is_causal=True, enable_gqa=True),
            "mask": kernel(heads(4), heads(4), heads(4), torch.ones(2, 1, 8, 8, dtype=torch.bool, device=device)),
            "float32": kernel(*(heads(4, torch.float32) for _ in range(3)), is_causal=True),
            "grouped float32": kernel(
                heads(4, torch.float32), *(heads(2, torch.float32) for _ in range(2)), is_causal=True, enable_gqa=True
            ),
            "accelerator": str(torch.accelerator.current_accelerator()),
        }
        with accelerator_mode(), _Recorded() as recorded:
            torch.nn.functional.silu(heads(1)).sum().backward()
    return {**answers, "silu": [op for op in recorded.ops if "silu" in op or "mul" in op]}


def main() -> int:
    """Run the named variants; models are written to FOLDER."""
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    for name in names:
        try:
            result = device_checks() if name == "CHECKS" else run(folder, name)
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()[-2000:]}
        print(json.dumps({"name": name, **result}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
