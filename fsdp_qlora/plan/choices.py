"""Resolves ``auto``: the fastest settings that fit, among those that change speed and memory but no numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from fsdp_qlora.config.auto import Choice, as_word, asked, switch
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.plan.memory import MemoryModel
from fsdp_qlora.plan.sizes import reserve_bytes
from fsdp_qlora.plan.storage import StorageSettings

KERNELS_KEY = "train.kernels"


@dataclass(frozen=True)
class Rung:
    """A combination of the settings that change speed and memory but no numbers."""

    checkpointing: str
    reshard_after_forward: bool
    cache_dequantized: bool


@dataclass(frozen=True)
class _Asked:
    """The rung that the settings ask for; None for ``auto``."""

    checkpointing: str | None
    reshard_after_forward: bool | None
    cache_dequantized: bool | None

    def allows(self, rung: Rung) -> bool:
        """Whether the rung has every value that is asked for."""
        return all(given is None or given == getattr(rung, name) for name, given in vars(self).items())


LADDER = (
    Rung("none", reshard_after_forward=False, cache_dequantized=True),
    Rung("none", reshard_after_forward=False, cache_dequantized=False),
    Rung("none", reshard_after_forward=True, cache_dequantized=True),
    Rung("none", reshard_after_forward=True, cache_dequantized=False),
    Rung("selective", reshard_after_forward=False, cache_dequantized=False),
    Rung("selective", reshard_after_forward=True, cache_dequantized=False),
    Rung("full", reshard_after_forward=False, cache_dequantized=False),
    Rung("full", reshard_after_forward=True, cache_dequantized=False),
)
"""Fastest first: recomputing a layer costs most, then gathering it again, then dequantizing it again
(benchmarks/results/step.md compares the order with measured times)."""
_PLAIN = Rung("none", reshard_after_forward=True, cache_dequantized=False)
"""The rung that ``debug=plain`` uses."""


def choose(
    config: RunConfig, memory: MemoryModel, settings: StorageSettings, budget: int | None
) -> tuple[StorageSettings, dict[str, Choice]]:
    """Return the settings with every ``auto`` resolved, and the choices made, by key.

    Args:
        config: the settings as given.
        memory: the model's bytes.
        settings: storage settings, including those given explicitly.
        budget: bytes available for tensors; if None, ``auto`` means no checkpointing, resharding after forward and no
            cached dense weights.
    """
    asked_for = _asked_for(config)
    wanted = _wanted(config, asked_for)
    candidates = list(_candidates(wanted, memory, settings))
    if budget is None:
        chosen, why = (
            replace(settings, cache_dequantized=bool(wanted.cache_dequantized)),
            "the available memory is unknown",
        )
    else:
        fitting = [c for c in candidates if memory.plan(c).peak <= budget]
        chosen = fitting[0] if fitting else candidates[-1]
        why = f"fits in {budget / 1e9:.1f} GB" if fitting else f"nothing fits in {budget / 1e9:.1f} GB"
    made = {
        "train.activation_checkpointing": (asked_for.checkpointing, chosen.checkpointing),
        "fsdp.reshard_after_forward": (asked_for.reshard_after_forward, as_word(chosen.reshard_after_forward)),
        "quant.cache_dequantized": (asked_for.cache_dequantized, as_word(chosen.cache_dequantized)),
    }
    reasons = dict.fromkeys(made, why if wanted == asked_for else "debug=plain")
    if not memory.dense.kept:
        reasons["quant.cache_dequantized"] = "nothing is dequantized in forward"
    elif wanted == asked_for and not (chosen.cache_dequantized or _worth_keeping(settings)):
        reasons["quant.cache_dequantized"] = "dequantizing again takes a CPU 2 % of a step"
    if settings.keeps_whole:  # nothing is gathered
        del made["fsdp.reshard_after_forward"]
    choices = {key: Choice(value, reasons[key]) for key, (given, value) in made.items() if given is None}
    return chosen, choices | {KERNELS_KEY: _kernels(config)}


def _asked_for(config: RunConfig) -> _Asked:
    return _Asked(
        asked(config.train.activation_checkpointing),
        switch(config.fsdp.reshard_after_forward),
        switch(config.quant.cache_dequantized),
    )


def _wanted(config: RunConfig, given: _Asked) -> _Asked:
    """Return what is asked for, with the values of ``debug=plain`` in place of ``auto``."""
    if config.debug.name != "plain":
        return given
    return _Asked(**(vars(_PLAIN) | {name: value for name, value in vars(given).items() if value is not None}))


def _kernels(config: RunConfig) -> Choice:
    """Decide ``train.kernels=auto``: upstream's modules, as long as nothing faster has been measured."""
    given = asked(config.train.kernels)
    return (
        Choice("torch", "no kernels have been measured on this device") if given is None else Choice(given, "as asked")
    )


def decided(config: RunConfig, settings: StorageSettings) -> RunConfig:
    """Return ``config`` with the choices of `choose` in place of ``auto``, and whole names for patterns of adapters."""
    return replace(
        config,
        lora=settings.lora,
        train=replace(config.train, activation_checkpointing=settings.checkpointing, kernels=_kernels(config).value),
        fsdp=replace(config.fsdp, reshard_after_forward=as_word(settings.reshard_after_forward)),
        quant=replace(config.quant, cache_dequantized=as_word(settings.cache_dequantized)),
    )


def tensor_budget(capacity: int, is_accelerator: bool) -> int:
    """Return the bytes of ``capacity`` for tensors: all but the reserve; 60 % on a CPU, whose memory is shared."""
    return capacity - reserve_bytes(0, str(capacity)) if is_accelerator else int(0.6 * capacity)


def _candidates(wanted: _Asked, memory: MemoryModel, settings: StorageSettings) -> Iterator[StorageSettings]:
    """Yield the rungs of the ladder that are compatible with the given settings."""
    for rung in LADDER:
        if not wanted.allows(rung):
            continue
        if wanted.reshard_after_forward is None and settings.shard_size == 1 and not rung.reshard_after_forward:
            continue  # a single rank has nothing to gather
        if rung.cache_dequantized and wanted.cache_dequantized is None and not _worth_keeping(settings):
            continue
        if rung.cache_dequantized and (not memory.dense.kept or settings.offload_activations):
            continue  # the hooks would move dense weights to the host and back, which takes longer than dequantizing
        if rung.checkpointing == "selective" and memory.offloaded_inside:
            continue
        if rung.checkpointing != "none" and not memory.shapes.recomputes:
            continue
        yield replace(settings, **vars(rung))


def _worth_keeping(settings: StorageSettings) -> bool:
    """Whether dense weights are kept wherever they fit: not until backward on a CPU, for 2 % of a step."""
    return settings.on_accelerator or settings.keeps_whole


def smaller(memory: MemoryModel, settings: StorageSettings) -> str | None:
    """Return the change of settings that holds less memory at the least cost, or None if there is none.

    As ``key=value (planned peak ...)``: the ladder's next rung, half the rows, or activations in host memory.
    """
    rows = max(1, settings.micro_batch_size // 2)
    changes = {
        "quant.cache_dequantized=false": replace(settings, cache_dequantized=False),
        "fsdp.reshard_after_forward=true": replace(settings, reshard_after_forward=True),
        "train.activation_checkpointing=selective": replace(settings, checkpointing="selective"),
        "train.activation_checkpointing=full": replace(settings, checkpointing="full"),
        f"train.micro_batch_size={rows}": replace(settings, micro_batch_size=rows),
        "fsdp.offload=activations": replace(settings, offload_activations=True, cache_dequantized=False),
    }
    peak = memory.plan(settings).peak
    for words, other in changes.items():
        if "selective" in words and memory.offloaded_inside:
            continue
        if "checkpointing" in words and not memory.shapes.recomputes:
            continue
        if (less := memory.plan(other).peak) < peak:
            return f"{words} (planned peak {less / 1e9:.1f} instead of {peak / 1e9:.1f} GB)"
    return None
