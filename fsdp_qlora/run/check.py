"""Opens a model and compares it with upstream's own code before any long work begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedConfig

from fsdp_qlora.attention.candidates import code_files
from fsdp_qlora.checks.agree import require_losses_agree
from fsdp_qlora.checks.results import (
    agreement_key,
    recall,
    recall_agreement,
    remember,
    remember_agreement,
    twin_key,
)
from fsdp_qlora.checks.task_twin import TaskTwin
from fsdp_qlora.checks.twin import Twin, check_twin
from fsdp_qlora.checks.verdict import Verdict, is_about_attention
from fsdp_qlora.config.auto import Choice
from fsdp_qlora.config.schema import LoraSettings, RunConfig
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.reduce import any_rank, gather_json, on_every, on_main
from fsdp_qlora.errors import ModelError
from fsdp_qlora.files.home import cache_folder
from fsdp_qlora.load.safetensors import SafetensorsFolder, file_digests
from fsdp_qlora.model.config import load_config
from fsdp_qlora.model.families import is_causal
from fsdp_qlora.model.root import CausalModel
from fsdp_qlora.objectives import build_objective
from fsdp_qlora.run.build import OpenedModel, Weights, load_model, open_model
from fsdp_qlora.run.decide import attentions_for, replace_attention


def check_model(config: RunConfig, folder: Path, ranks: Ranks) -> Verdict:
    """Compare a small twin of the model with upstream's code, or recall the result; return the matching attention.

    ``config`` has everything but the attention resolved (`OpenedModel.config`), so the twin runs as the model will.

    Raises:
        ModelError: identically on every rank, if no attention implementation matches.
    """
    model = replace(config.model, add_tokens=[])  # the twin compares the layers, which know no tokens
    lora = LoraSettings() if config.lora.trains_base else config.lora  # upstream's side has adapters
    config = replace(config, model=model, lora=lora)
    model_config = on_every(lambda: load_config(folder, model.trust_remote_code, model.config_overrides), ranks)
    candidates = on_every(lambda: attentions_for(config, ranks.device, folder), ranks)
    _require_alike(candidates, ranks)
    objective = build_objective(config.objective)
    if model.check == "off" or (objective.of_tokens and not is_causal(model_config)):
        return Verdict(candidates[0])
    objective.configure(model_config)
    kept, key, known = on_every(lambda: _remembered(config, model_config, folder, candidates, ranks), ranks)
    if not any_rank(known is None or model.check == "always", ranks) and known is not None:
        _require_alike([known.attention], ranks)
        return known

    def build(settings: RunConfig, twin: Path) -> tuple[CausalModel, OpenedModel]:
        opened = on_every(lambda: open_model(settings, twin, ranks, None, say=False), ranks)
        return load_model(opened.compiled(False), ranks)[0], opened

    own_code = folder if model.trust_remote_code and any(folder.glob("*.py")) else None
    kind = Twin if objective.of_tokens else TaskTwin
    verdict = check_twin(config, model_config, own_code, candidates, ranks, build, kind)
    remember(kept, key, verdict)
    return verdict


def _remembered(
    config: RunConfig, model_config: PreTrainedConfig, folder: Path, candidates: Sequence[str], ranks: Ranks
) -> tuple[Path, str, Verdict | None]:
    """Return the folder of cached results, the key of this one, and the cached result if there is one."""
    code = code_files(model_config, folder, config.model.trust_remote_code)
    key = twin_key(config, model_config, code, candidates, ranks.device, ranks.size)
    return _kept(), key, recall(_kept(), key, model_config)


def check_losses(opened: OpenedModel, model: CausalModel, folder: Path, ranks: Ranks) -> None:
    """Compare the training losses with the model's own logits, unless they are known to agree. Every rank calls it.

    A pass is remembered for the same weights, settings, code and number of ranks. What another start may load
    differently is compared each time: `gather.verify_gather`.

    Raises:
        ModelError: identically on every rank, if they differ or cannot be computed.
    """
    key = on_main(lambda: _agreement(opened, folder, ranks), ranks)
    if key is None:
        return
    require_losses_agree(model, ranks)
    if ranks.is_main and key:
        remember_agreement(_kept(), key)


def _agreement(opened: OpenedModel, folder: Path, ranks: Ranks) -> str | None:
    """Return None if the losses are known to agree, else the key to remember it by ("" if it is not to be)."""
    config, model_config = opened.config, opened.base.config
    if config.model.check == "always" or config.lora.init_from:
        return ""
    code = code_files(model_config, folder, config.model.trust_remote_code)
    key = agreement_key(config, model_config, code, file_digests(folder), ranks.device, ranks.size, opened.first_added)
    return None if recall_agreement(_kept(), key) else key


def _kept() -> Path:
    return cache_folder() / "checks"


def _require_alike(attentions: Sequence[str], ranks: Ranks) -> None:
    """Raise on all ranks if they would take different attention implementations."""
    of_ranks = gather_json(list(attentions), ranks)
    other = next((rank for rank, theirs in enumerate(of_ranks) if theirs != of_ranks[0]), None)
    if other is not None:
        raise ModelError(
            f"model.attn_implementation: rank 0 would use {', '.join(of_ranks[0])}, but rank {other} "
            f"{', '.join(of_ranks[other])}: their machines have different libraries. Install the same ones on all."
        )


def told(verdict: Verdict) -> Choice:
    """Return the chosen attention, and why preferred ones were rejected."""
    fell = "; ".join(f"{attention} fell: {why}" for attention, why in verdict.fell.items())
    return Choice(verdict.attention, fell)


def open_and_check(
    config: RunConfig, folder: Path, ranks: Ranks, budget: int | None, weights: Weights = SafetensorsFolder
) -> tuple[OpenedModel, Verdict]:
    """Open a model and choose the attention that matches upstream's code under everything that the plan decided.

    Raises:
        ModelError: if the model cannot be opened, or no attention matches.
        PlanError: if the settings do not suit the model.
    """
    opened = on_every(lambda: _open_first(config, folder, ranks, budget, weights), ranks)
    taken = opened.config.model.attn_implementation
    ranks.phases.enter("comparing a small twin of the model with upstream's code")
    verdict = check_model(replace_attention(opened.config, config.model.attn_implementation), folder, ranks)
    if verdict.attention != taken:
        chosen = replace_attention(config, verdict.attention)
        opened = on_every(lambda: open_model(chosen, folder, ranks, budget, say=False, weights=weights), ranks)
    return opened, verdict


def _open_first(config: RunConfig, folder: Path, ranks: Ranks, budget: int | None, weights: Weights) -> OpenedModel:
    """Open the model with the first attention implementation that its class accepts."""
    *others, last = attentions_for(config, ranks.device, folder)
    for attention in others:
        try:
            return open_model(replace_attention(config, attention), folder, ranks, budget, weights=weights)
        except ModelError as error:
            if not is_about_attention(error):
                raise
    return open_model(replace_attention(config, last), folder, ranks, budget, weights=weights)
