"""What must be the same for a run to resume: settings, data and base model; which changes are refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fsdp_qlora.config.choices import FORMATS, NONE
from fsdp_qlora.config.facts import MAY_CHANGE, YOUNGER, FormatOption, ReadBy, facts, keys_with, value_of
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.quant.formats import build_format

_MAY_CHANGE = keys_with(RunConfig, MAY_CHANGE)
"""Settings of the blocking groups that may differ on a resume (the base model is identified by its files instead)."""
_YOUNGER = {key: value_of(RunConfig(), key) for key in keys_with(RunConfig, YOUNGER)}
"""Settings that older checkpoints lack, with their defaults."""
_READERS = {key: fact for key, fact in facts(RunConfig) if isinstance(fact, ReadBy | FormatOption)}
"""Settings that only some optimizers or formats read."""
BLOCKING_GROUPS = ("model", "quant", "lora", "precision", "train", "optim", "schedule", "objective")
DATA_KEY = "data"
"""Key that covers data sources, tokenizer, chat template and the settings of the data group together."""
INITIAL_ADAPTER = "initial adapter, taken off the base"
"""Key of the digest of what the adapters started from: with other values, the base would be another one."""
_BASE_FILE, _WHOLE = "base model file ", ", whole"


def blocking_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that must match for a resume, by dotted key."""
    blocking: dict[str, Any] = {"run.seed": config["run"]["seed"]}
    for group in BLOCKING_GROUPS:
        blocking |= {f"{group}.{key}": value for key, value in config[group].items()}
    return {key: value for key, value in blocking.items() if key not in _MAY_CHANGE and _is_read(key, blocking)}


def without(identity: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return the identity without the settings that may differ (``optim`` stands for all of its keys).

    Settings that nothing reads are left out, because older checkpoints recorded some. Whole-file digests are left out
    as well, because one of the two sides may not know them yet: see `whole_of`.
    """
    free = {DATA_KEY if key.partition(".")[0] == DATA_KEY else key for key in overrides}
    return {
        key: value
        for key, value in identity.items()
        if key not in free and key.partition(".")[0] not in free and not _is_whole(key) and _is_read(key, identity)
    }


def _is_read(key: str, settings: Mapping[str, Any]) -> bool:
    """Whether the optimizer, or a format, of these settings reads one of them, or it is set."""
    if key in _YOUNGER and settings.get(key) in (None, _YOUNGER[key]):
        return False
    reader = _READERS.get(key)
    if isinstance(reader, FormatOption):
        overrides = settings.get("quant.overrides")
        kinds = [settings.get("quant.name"), settings.get("quant.embeddings"), settings.get("quant.vision", NONE)]
        kinds += overrides.values() if isinstance(overrides, dict) else []
        return any(_takes(kind, reader.name) for kind in kinds)
    return reader is None or settings.get("optim.name") in reader.optimizers


def _takes(kind: Any, option: str) -> bool:
    """Whether a format takes an option; one that is not known here may."""
    if kind == NONE:
        return False
    return not isinstance(kind, str) or kind not in FORMATS or option in build_format(kind).takes


def identity_of(
    config: dict[str, Any], base: dict[str, Any], data_key: str, repairs: Iterable[str] = ()
) -> dict[str, Any]:
    """Return everything that must match between a run and the checkpoint it resumes from.

    Args:
        config: the settings as nested dictionaries.
        base: file name -> digest of the base model's files, as `file_digests` returns them.
        data_key: key of the prepared data (sources, tokenizer, template, settings).
        repairs: fixes that changed the losses of this model; checkpoints from before them lack these keys.
    """
    identity = blocking_settings(config) | {DATA_KEY: data_key} | dict.fromkeys(repairs, True)
    return identity | {_BASE_FILE + name: value for name, value in base.items()}


def with_whole(identity: dict[str, Any], digests: Mapping[str, str]) -> dict[str, Any]:
    """Return the identity with the whole-file digests of the base model's files that are known so far."""
    return identity | {f"{_BASE_FILE}{name}{_WHOLE}": digest for name, digest in dict(digests).items()}


def whole_of(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return the whole-file digests of the base model's files in an identity, by file name."""
    return {
        key.removeprefix(_BASE_FILE).removesuffix(_WHOLE): value
        for key, value in identity.items()
        if _is_whole(key)
    }  # fmt: skip


def _is_whole(key: str) -> bool:
    return key.startswith(_BASE_FILE) and key.endswith(_WHOLE)
