"""A model folder's transformers config with ``model.config_overrides`` applied; errors for unbuildable models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from fsdp_qlora.config.choices import nearest
from fsdp_qlora.errors import ModelError, typed_line
from fsdp_qlora.files.bounded import OutOfBoundsError, require_bounded_config, require_bounded_values

GENERATION = "generation_config.json"
_UNBUILDABLE = (ValueError, KeyError, TypeError, AttributeError, OSError, ImportError, StrictDataclassError)
_ROPE, _ROPE_KEYS = "rope_parameters", ("rope_theta", "partial_rotary_factor")


def load_config(folder: Path, trust_remote_code: bool = False, overrides: Mapping[str, Any] | None = None) -> Any:
    """Return the transformers config of ``folder`` with ``overrides`` applied.

    Raises:
        ModelError: if the architecture is unknown, needs code that is not trusted, or an override does not fit it.
    """
    require_sane(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # odd values can raise anything upstream: a division by zero, an index error, ...
        raise not_buildable(folder, error) from error
    if not overrides:
        return config
    try:
        require_bounded_values(wanted := _merged(config, overrides, ""))
        changed = type(config).from_dict(wanted)
    except _UNBUILDABLE as error:
        raise ModelError(f"model.config_overrides: {dict(overrides)} does not fit {folder}: {_said(error)}") from error
    _require_taken(_merged(config, overrides, ""), changed, folder)
    return changed


def load_generation_config(folder: Path) -> GenerationConfig | None:
    """Return what ``folder`` says of generation, as upstream's ``from_pretrained`` reads it; None without such a file.

    Raises:
        ModelError: if upstream cannot read it.
    """
    if not (folder / GENERATION).is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(folder)
    except Exception as error:  # odd values can raise anything in upstream's code
        raise ModelError(
            f"model.name: transformers cannot read {folder / GENERATION}: {typed_line(error)} Mend or remove it."
        ) from error


def require_sane(folder: Path) -> None:
    """Check that the numbers in a folder's config.json are plausible for a model, before anything is built from them.

    Raises:
        ModelError: naming the implausible key.
    """
    try:
        require_bounded_config(folder)
    except OutOfBoundsError as error:
        raise ModelError(f"model.name: {folder} cannot be built: {error}.") from error


def not_buildable(folder: Path, error: Exception) -> ModelError:
    """Return the error to show the user for an exception from transformers."""
    if "trust_remote_code" in str(error):
        return ModelError(
            f"model.trust_remote_code: {folder} can only be built by Python code that comes with it. "
            "Read that code; if you trust it, set model.trust_remote_code=true."
        )
    said = _said(error) if isinstance(error, _UNBUILDABLE) else typed_line(error)
    return ModelError(f"model.name: {folder} cannot be built: {said}")


def _said(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def _merged(config: PreTrainedConfig, overrides: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return the config as a dictionary with the overrides applied; mappings are merged into existing ones."""
    values = config.to_dict()
    for key, value in _current_spelling(values, overrides).items():
        if key not in values:
            raise ModelError(
                f"model.config_overrides.{prefix}{key}: {type(config).__name__} has no such key.{nearest(key, values)}"
            )
        inner = getattr(config, key, None)
        if isinstance(inner, PreTrainedConfig) and isinstance(value, Mapping):
            values[key] = _merged(inner, value, f"{prefix}{key}.")
        elif isinstance(values[key], dict) and isinstance(value, Mapping):
            values[key] = {**values[key], **value}
        else:
            values[key] = value
    return values


def _current_spelling(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the overrides with ``rope_theta`` and ``rope_scaling`` moved into one mapping, as in transformers 5.

    As separate keywords next to that mapping, they would be silently overridden by it.
    """
    renamed, rope = dict(overrides), values.get(_ROPE)
    if not isinstance(rope, dict) or any(isinstance(part, dict) for part in rope.values()):
        return renamed  # another spelling, or one mapping per kind of layer: then only the full key is unambiguous
    merged = dict(renamed.pop(_ROPE, {}))
    if "rope_scaling" in renamed and "rope_scaling" not in values:
        merged |= renamed.pop("rope_scaling")
    merged |= {key: renamed.pop(key) for key in _ROPE_KEYS if key in renamed and key not in values}
    if "type" in merged:
        merged.setdefault("rope_type", merged["type"])
    return {**renamed, _ROPE: merged} if merged else renamed


def _require_taken(wanted: Mapping[str, Any], config: PreTrainedConfig, folder: Path) -> None:
    taken = config.to_dict()
    for key, value in wanted.items():
        if key in taken and taken[key] != value and not isinstance(value, dict):
            raise ModelError(
                f"model.config_overrides.{key}: {folder} does not accept {value!r}; it keeps {taken[key]!r}."
            )
