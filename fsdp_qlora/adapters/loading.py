"""Fills a model's adapters, and what is trained beside them, from a PEFT adapter folder."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import nn

from fsdp_qlora.adapters.experts import stacked_tensors, stored_shape, stored_value
from fsdp_qlora.adapters.folder import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    AdapterConfig,
    adapted_modules,
    opened_weights,
    read_adapter_config,
    require_shapes,
    stored_modules,
)
from fsdp_qlora.adapters.linear import QuantLoraLinear
from fsdp_qlora.adapters.method import build_method, tensor_names
from fsdp_qlora.adapters.names import ADAPTER, adapter_parameters, base_name, trainable_parameters
from fsdp_qlora.adapters.spellings import in_model
from fsdp_qlora.adapters.whole import without_copies
from fsdp_qlora.config.schema import LoraSettings
from fsdp_qlora.distributed.shards import fill_slice
from fsdp_qlora.errors import ModelError
from fsdp_qlora.files.read import own_file
from fsdp_qlora.load.finite import require_finite
from fsdp_qlora.shapes.tokens import TOKEN_ROWS


def cast_adapters(model: nn.Module, dtype: torch.dtype, kept: Collection[str]) -> None:
    """Cast whatever is trained, in float32, to the compute dtype, once and for all: FSDP does it in each forward.

    ``kept`` names the parameters of the base that are computed with in float32. Rows of added tokens and adapters of
    our own layers stay in float32, too: what reads them casts them.
    """
    ours = {p for module in model.modules() if isinstance(module, QuantLoraLinear) for p in module.parameters()}
    for name, parameter in model.named_parameters():
        own = base_name(name.removeprefix("model."))
        stays = own in kept or parameter in ours or name.endswith(TOKEN_ROWS)
        if parameter.dtype == torch.float32 and not stays:
            parameter.data = parameter.data.to(dtype)


@torch.no_grad()
def load_adapter(
    folder: Path, model: nn.Module, shard_rank: int = 0, shard_size: int = 1, lora: LoraSettings | None = None,
    name: str | None = None,
) -> None:  # fmt: skip
    """Fill a model's adapters, attached with the settings ``lora``, from a PEFT adapter folder.

    ``name`` is the adapter's name on the model; None = the one that is trained.

    Raises:
        ModelError: if its tensors do not match the model's by name and shape, or a value is not finite.
    """
    file = own_file(folder, WEIGHTS_NAME)
    parameters = dict(trainable_parameters(model) if name is None else adapter_parameters(model, name))
    config = read_adapter_config(folder)
    modules, exchanged = stored_modules(folder, config), config.exchanged
    stacks = stacked_tensors(model)
    with opened_weights(file) as stored:
        stored.require_equal_copies()
        lora = lora or LoraSettings()
        fixed = build_method(lora.method).fixed(model, lora, name or ADAPTER)
        known = {**parameters, **fixed}
        names = without_copies(stored, stored.keys(), parameters, config.modules)
        stored_as = {key if key in known else in_model(key, known): key for key in names}
        if odd := sorted(stored_as.keys() ^ parameters.keys() ^ fixed.keys()):
            adapted = adapted_modules(dict(adapter_parameters(model, name or ADAPTER)), file)
            hint = _hint(odd, sorted(set(adapted) - set(modules)), config)
            if fixed.keys() & set(odd):
                hint = _hint_of_projections(lora)
            raise ModelError(f"adapter: {file} and the model differ in {len(odd)} tensors (first: {odd[0]}).{hint}")
        shapes = {
            key: stored_shape(stored, stored_as[key], target.shape, stacks.get(key), exchanged)
            for key, target in known.items()
        }
        require_shapes(file, {key: target.shape for key, target in known.items()}, shapes)
        for key, target in known.items():
            value = stored_value(stored, stored_as[key], target.shape, stacks.get(key), exchanged)
            require_finite(value, f"adapter: {key} in {file}")
            fill_slice(target, value, shard_rank, shard_size)


def _hint(odd: Sequence[str], ours: Sequence[str], config: AdapterConfig) -> str:
    """Say which setting differs; ``ours`` are the modules that have adapters on the model only."""
    if odd[0].endswith(TOKEN_ROWS):
        return " One of them has rows of added tokens: set model.add_tokens to the adapter's."
    of_adapters = tuple(f".{end}" for end in tensor_names())
    if beside := [key for key in odd if not key.endswith(of_adapters)]:
        key, theirs = ("bias", config.bias) if beside[0].endswith(".bias") else ("modules_to_save", config.modules)
        return (
            f" They differ in trained weights of the base: set lora.{key} to the adapter's ({theirs}). (If embedding "
            "and head share a table here, the adapter must not have trained them apart.)"
        )
    key = "target_parameters" if any(".experts" in name for name in ours[:1]) else "target_modules"
    return f" It has no adapter for {ours[0]}: set lora.{key} to the adapter's." if ours else ""


def _hint_of_projections(lora: LoraSettings) -> str:
    seed = lora.options.get("projection_prng_key", 0)
    return (
        f" The file lacks what {lora.method} never trains, although its config says that it is there "
        f"(save_projection). Copy it again, or set save_projection=false in {CONFIG_NAME}: it is then drawn from "
        f"projection_prng_key={seed}."
    )
