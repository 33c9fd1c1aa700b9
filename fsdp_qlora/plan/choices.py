"""Resolves ``auto``: the fastest settings that fit, among those that change speed and memory but no numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from fsdp_qlora.config.auto import Choice, as_word, asked, switch
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.plan.memory import MemoryModel, StorageSettings
from fsdp_qlora.plan.sizes import reserve_bytes

_Ladder = tuple[tuple[str, bool, bool], ...]
LADDER: _Ladder = (
    ("none", False, True),
    ("none", False, False),
    ("none", True, True),
    ("none", True, False),
    ("selective", False, False),
    ("selective", True, False),
    ("full", False, False),
    ("full", True, False),
)
"""(checkpointing, reshard after forward, cache dequantized), fastest first: recomputing a layer costs most, then
gathering it again, then dequantizing it again (`benchmarks/auto.py` compares the order with measured times)."""
_Asked = tuple[str | None, bool | None, bool | None]
"""The rung that the settings ask for; None for ``auto``."""
_PLAIN = ("none", True, False)
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
    wanted = _wanted(config)
    candidates = list(_candidates(wanted, memory, settings))
    if budget is None:
        chosen, why = replace(settings, cache_dequantized=bool(wanted[2])), "the available memory is unknown"
    else:
        fitting = [c for c in candidates if memory.plan(c).peak <= budget]
        chosen = fitting[0] if fitting else candidates[-1]
        why = f"fits in {budget / 1e9:.1f} GB" if fitting else f"nothing fits in {budget / 1e9:.1f} GB"
    made = {
        "train.activation_checkpointing": (wanted[0], chosen.checkpointing),
        "fsdp.reshard_after_forward": (wanted[1], as_word(chosen.reshard_after_forward)),
        "quant.cache_dequantized": (wanted[2], as_word(chosen.cache_dequantized)),
    }
    return chosen, {key: Choice(value, why) for key, (given, value) in made.items() if given is None}


def _wanted(config: RunConfig) -> _Asked:
    given = (
        asked(config.train.activation_checkpointing),
        switch(config.fsdp.reshard_after_forward),
        switch(config.quant.cache_dequantized),
    )
    if config.debug.name != "plain":
        return given
    checkpointing, reshard, cache = given
    return (
        checkpointing or _PLAIN[0],
        _PLAIN[1] if reshard is None else reshard,
        _PLAIN[2] if cache is None else cache,
    )


def decided(config: RunConfig, settings: StorageSettings) -> RunConfig:
    """Return ``config`` with the choices of `choose` in place of ``auto``."""
    return replace(
        config,
        train=replace(config.train, activation_checkpointing=settings.checkpointing),
        fsdp=replace(config.fsdp, reshard_after_forward=as_word(settings.reshard_after_forward)),
        quant=replace(config.quant, cache_dequantized=as_word(settings.cache_dequantized)),
    )


def tensor_budget(capacity: int, is_accelerator: bool) -> int:
    """Return the bytes of ``capacity`` for tensors: all but the reserve; 60 % on a CPU, whose memory is shared."""
    return capacity - reserve_bytes(0, str(capacity)) if is_accelerator else int(0.6 * capacity)


def _candidates(wanted: _Asked, memory: MemoryModel, settings: StorageSettings) -> Iterator[StorageSettings]:
    """Yield the rungs of the ladder that are compatible with the given settings."""
    for rung in LADDER:
        if any(given is not None and given != value for given, value in zip(wanted, rung, strict=True)):
            continue
        if wanted[1] is None and settings.shard_size == 1 and not rung[1]:
            continue  # a single rank has nothing to gather
        if rung[2] and not memory.all_dense:
            continue
        if rung[0] == "selective" and memory.offloaded_inside:
            continue
        yield replace(settings, checkpointing=rung[0], reshard_after_forward=rung[1], cache_dequantized=rung[2])
