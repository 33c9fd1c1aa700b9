"""Can vLLM serve an adapter as it was trained? And the form of a LoRA that it certainly can.

vLLM reads a few keys of adapter_config.json and passes over the others (``PEFTHelper.from_dict`` in
https://github.com/vllm-project/vllm/blob/main/vllm/lora/peft_helper.py), so that some adapters are refused, and others
compute something else without a word.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from fsdp_qlora.adapters.based import fingerprint_in
from fsdp_qlora.adapters.folder import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    opened_weights,
    read_adapter_config,
    stored_modules,
)
from fsdp_qlora.adapters.method import of_target, scaling_of
from fsdp_qlora.adapters.names import IN_FILE, LORA_A, LORA_B
from fsdp_qlora.errors import ModelError
from fsdp_qlora.export.adapter import write_folder
from fsdp_qlora.files.read import own_file, read_json

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of ``--max-lora-rank`` (``MaxLoRARanks`` in vllm/config/lora.py)."""
_REFUSED: Mapping[str, str] = {
    "use_dora": "DoRA",
    "modules_to_save": "modules_to_save",
    "trainable_token_indices": "rows of added tokens",
    "lora_bias": "trained biases",
}
"""Settings that vLLM refuses, or whose tensors it refuses: what they are, in words."""
UNNAMED = "BASE"
"""Stands for the model to serve an adapter on that names none."""
_STARTS = ("pissa", "olora", "loftq")
"""Beginnings of ``init_lora_weights`` with which the base is not the original one."""
_ON_EXPERTS = (
    "only model classes with is_3d_moe_weight (such as gpt-oss) read adapters on stacked experts, and only if both "
    "weights have one; it drops or refuses the others (vllm#41754, vllm#52198)"
)
_PASSED_OVER = ("rank_pattern", "alpha_pattern")
"""Settings that change what an adapter computes and that vLLM does not read."""


def obstacles(config: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Return why vLLM would refuse an adapter, or compute something else with it.

    Args:
        config: its adapter_config.json.
        names: the names of its tensors.
    """
    if config.get("peft_type") != "LORA":
        return [f"it knows LoRA only, not {config.get('peft_type')}"]
    reasons = [f"it refuses {words}" for key, words in _REFUSED.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        reasons.append("it refuses trained biases")
    if str(config.get("init_lora_weights")).startswith(_STARTS):
        reasons.append("it serves the original base, whose weights this adapter's start was taken off")
    reasons += [f"it passes over {key} without a word" for key in _PASSED_OVER if config.get(key)]
    if config.get("target_parameters"):
        reasons.append(_ON_EXPERTS)
    odd = [name for name in names if not name.endswith((LORA_A, LORA_B))]
    if odd and not reasons:
        reasons.append(f"it does not know tensors such as {odd[0]}")
    edges = sorted({part for name in names for part in ("embed_tokens", "lm_head") if f".{part}." in name})
    if edges and not config.get("trainable_token_indices"):
        reasons.append(f"most of its models take no adapter on {' and '.join(edges)}")
    if (rank := _rank(config)) > RANKS[-1]:
        reasons.append(f"its largest rank is {RANKS[-1]}, and this one has {rank}")
    return reasons


def served_by_vllm(folder: Path, base: str | None = None) -> str:
    """Return the line to print about an adapter's folder: whether vLLM serves it, and how or why not.

    ``base`` is the model to serve it on; None: the one that the adapter names.
    """
    config = read_json(own_file(folder, CONFIG_NAME), dict[str, Any])
    with opened_weights(own_file(folder, WEIGHTS_NAME)) as stored:
        reasons = obstacles(config, list(stored.keys()))
    if not reasons:
        rank = next(rank for rank in RANKS if rank >= _rank(config))
        own, base = base is not None, base or config.get("base_model_name_or_path") or UNNAMED
        words = ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", str(rank)]
        words += ["--lora-modules", f"tuned={folder}"]
        where = f"{UNNAMED}, the 16-bit base, which the adapter does not name" if base == UNNAMED else "the 16-bit base"
        beside = "" if own else f" (on {where}; what=served serves it on one in 4 bits)"
        return f"vLLM: yes: {shlex.join(words)}{beside}"
    plain = all(any(key in reason for key in _PASSED_OVER) for reason in reasons)
    way = (
        "export.for_vllm=true writes a form that it computes right"
        if plain
        else "what=merged writes a model that it serves"
    )
    if str(config.get("init_lora_weights")).startswith(_STARTS):
        way = "export.plain_lora=true converts it"
    verdict = "it depends on the model" if reasons == [_ON_EXPERTS] else "no"
    return f"vLLM: {verdict}, because {'; '.join(reasons)} ({way})."


def _rank(config: Mapping[str, Any]) -> int:
    return max([int(config.get("r", 8)), *(int(r) for r in (config.get("rank_pattern") or {}).values())])


@torch.no_grad()
def rewrite_for_vllm(folder: Path) -> None:
    """Rewrite a LoRA in place as one of a single rank and scaling 1, which computes the same.

    Each target's scaling is multiplied into its B, and ranks below the largest are padded with zeros.

    Raises:
        ModelError: if it is anything but a LoRA on linears.
        StorageError: if the folder cannot be written.
    """
    config = read_json(own_file(folder, CONFIG_NAME), dict[str, Any])
    with opened_weights(own_file(folder, WEIGHTS_NAME)) as stored:
        names = list(stored.keys())
        if reasons := obstacles({**config, **dict.fromkeys(_PASSED_OVER)}, names):
            raise ModelError(
                f"export.for_vllm: no form of {folder} is certain to be served right by vLLM: {'; '.join(reasons)}. "
                "Use what=merged."
            )
        tensors = {name: stored.get_tensor(name).float() for name in names}
    one_scaling(folder, folder, config, tensors)


def one_scaling(
    source: Path, target: Path, config: Mapping[str, Any], tensors: dict[str, torch.Tensor]
) -> None:  # fmt: skip
    """Write a LoRA of a single rank and scaling 1 that computes the same as the one in ``source``.

    Args:
        source: a LoRA on linears.
        target: the folder to write; may be ``source``.
        config: adapter_config.json of the result, but for ranks and scalings.
        tensors: the tensors of ``source`` in float32; they are replaced.

    Raises:
        StorageError: if the folder cannot be written.
    """
    adapter, rank = read_adapter_config(source), _rank(config)
    lora = adapter.settings(stored_modules(source, adapter))
    for name, value in tensors.items():
        own = of_target(lora, name.removeprefix(IN_FILE).removesuffix(LORA_A).removesuffix(LORA_B))
        more = rank - own.r
        if name.endswith(LORA_A):
            tensors[name] = torch.cat([value, value.new_zeros(more, value.shape[1])])
        else:
            tensors[name] = torch.cat([value * scaling_of(own), value.new_zeros(value.shape[0], more)], dim=1)
    plain = {"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    write_folder(source, target, tensors, {**config, **plain}, fingerprint_in(source), overwrite=source == target)
