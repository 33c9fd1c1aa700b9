"""Several adapters on one frozen base, by name: attached together, switched, or chosen for each row of a batch.

They are sharded with the base like a trained one, so they must all be attached before it is sharded. PEFT's own layers
and ours hold them; PEFT passes the names of the rows (``adapter_names``) to each layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import PreTrainedModel

from fsdp_qlora.adapters.folder import blamed_on_adapter
from fsdp_qlora.adapters.loading import load_adapter
from fsdp_qlora.adapters.lora import AdaptedModel, attach_adapters, attach_another
from fsdp_qlora.adapters.method import build_method
from fsdp_qlora.adapters.names import adapter_parameters, base_name
from fsdp_qlora.adapters.peft_layers import adapted_layers, has_adapter
from fsdp_qlora.adapters.whole import trained_whole
from fsdp_qlora.config.choices import nearest
from fsdp_qlora.config.schema import LoraSettings
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.shards import local_tensor
from fsdp_qlora.errors import ModelError, PlanError
from fsdp_qlora.shapes.linears import ModelShapes
from fsdp_qlora.shapes.targets import target_linears

BASE = "__base__"
"""PEFT's name for the base alone, in place of an adapter's."""


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter on a base that has several."""

    name: str
    folder: Path
    lora: LoraSettings
    """Its settings, with whole names of targets."""


@dataclass(frozen=True)
class AdapterSize:
    """What an adapter takes."""

    modules: int
    """Linears that it adapts."""
    num_parameters: int
    num_bytes: int
    """Bytes of the whole adapter."""
    bytes_here: int
    """Bytes on this rank."""


def require_together(adapters: Sequence[ServedAdapter]) -> None:
    """Check that these adapters can be on one base.

    Raises:
        ModelError: naming the first pair that cannot.
    """
    for adapter in adapters:
        if adapter.name in dir(
            nn.ModuleDict()
        ):  # PEFT's layers keep adapters in dictionaries that have such attributes
            raise ModelError(f"adapter: {adapter.name!r} cannot be an adapter's name in PEFT; choose another one.")
    first, *others = adapters
    kind = build_method(first.lora.method)
    if others and kind.alone:
        raise ModelError(
            f"adapter: {first.name} is {first.lora.method}, whose layers share projections; a base takes one such "
            "adapter at a time. Load it alone."
        )
    for other in others:
        method = build_method(other.lora.method)
        if method.config is not kind.config or (method.layer is None) is not (kind.layer is None):
            raise ModelError(
                f"adapter: {first.name} is {first.lora.method} and {other.name} is {other.lora.method}; only "
                "adapters of one method (lora and rslora count as one) can be on a base together. Load them one at a "
                "time."
            )


def attach_served(
    model: PreTrainedModel, shapes: ModelShapes, adapters: Sequence[ServedAdapter], task_type: str | None
) -> AdaptedModel:
    """Attach these adapters to a meta model; the first one is in use. See `attach_adapters`.

    All are marked as trained, as a single one is: loading tells adapters from the base by that. `load_served` freezes
    them.

    Raises:
        ModelError: if one does not fit the model, or they do not go together.
    """
    require_together(adapters)
    adapted = None
    for adapter in adapters:
        try:
            targets = target_linears(shapes, adapter.lora.target_modules)
        except PlanError as error:
            raise blamed_on_adapter(error, adapter.folder) from error
        if table := next((name for name in targets if name in (shapes.embedding, shapes.head)), None):
            raise ModelError(
                f"adapter: {adapter.name} adapts {table}, and a base with several adapters takes none that does; load "
                "it alone."
            )
        if adapted is None:
            adapted = attach_adapters(model, targets, adapter.lora, task_type, name=adapter.name)
        else:
            attach_another(adapted, targets, adapter.lora, task_type, adapter.name)
    assert adapted is not None
    for adapter in adapters:
        for _, parameter in adapter_parameters(adapted, adapter.name):
            parameter.requires_grad_(True)
    return adapted


def load_served(model: nn.Module, adapters: Sequence[ServedAdapter], ranks: Ranks) -> None:
    """Fill the adapters of a sharded model from their folders, and freeze them.

    Raises:
        ModelError: as `load_adapter`.
    """
    for adapter in adapters:
        load_adapter(adapter.folder, model, ranks.shard_rank, ranks.shard_size, adapter.lora, adapter.name)
    model.requires_grad_(False)


def adapter_size(model: nn.Module, name: str) -> AdapterSize:
    """Return what the adapter ``name`` of a sharded model takes, in numbers and bytes."""
    tensors = [parameter for _, parameter in adapter_parameters(model, name)]
    layers = [layer for layer in adapted_layers(model).values() if has_adapter(layer, name)]
    return AdapterSize(
        len(layers), sum(t.numel() for t in tensors), sum(t.numel() * t.itemsize for t in tensors),
        sum(local_tensor(t).numel() * t.itemsize for t in tensors),
    )  # fmt: skip


def use_adapter(model: AdaptedModel, name: str | None) -> None:
    """Compute with the adapter ``name`` from now on, or with the base alone (None or ``__base__``).

    What is trained stays so: PEFT's own switches would also choose that.

    Raises:
        ModelError: if there is no such adapter.
    """
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    if name is None or name == BASE:
        if whole := trained_whole(model):
            raise ModelError(
                f"adapter_names: {base_name(whole[0])} was trained whole, and the base keeps no other version of it; "
                "load the base without the adapter."
            )
        cast(BaseTuner, model.base_model).disable_adapter_layers()
    else:
        _require_known([name], model.peft_config)
        cast(BaseTuner, model.base_model).enable_adapter_layers()
        model.set_adapter(name)
    for parameter, flag in trained:
        parameter.requires_grad_(flag)


def require_rows(model: AdaptedModel, names: Sequence[str], rows: int | None = None) -> None:
    """Check that each row of a batch can be computed with the adapter of its name.

    Raises:
        ModelError: if a name is unknown, there is not one a row, or the model does not compute rows apart.
    """
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ModelError(f"adapter_names: expected a list with the name of an adapter for each row, got {names!r}.")
    _require_known([name for name in names if name != BASE], model.peft_config)
    if rows is not None and rows != len(names):
        raise ModelError(f"adapter_names: {len(names)} names for {rows} rows; give one for each row of the batch.")
    if model.training:
        raise ModelError("adapter_names: only without training; call model.eval() first.")
    layers = adapted_layers(model)
    if odd := [type(x).__name__ for x in layers.values() if not isinstance(x, LoraLayer) or any(x.use_dora.values())]:
        raise ModelError(
            f"adapter_names: PEFT's layers of these adapters ({odd[0]}) compute a whole batch with one adapter; group "
            "the rows by adapter, and switch with use_adapter."
        )
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
    inner = [name for name in lists if any(name.startswith(f"{outer}.") for outer in lists)]
    if within := next((x for x in layers if any(x.startswith(f"{name}.") for name in inner)), None):
        raise ModelError(
            f"adapter_names: {within} is one of several experts, which see tokens and not rows; group the rows by "
            "adapter, and switch with use_adapter."
        )


def _require_known(names: Iterable[str], known: Mapping[str, object]) -> None:
    for name in names:
        if name not in known:
            raise ModelError(
                f"adapter_names: there is no adapter {name!r}; loaded are {', '.join(known)} (and {BASE} for none)."
                f"{nearest(name, known)}"
            )
