"""Parameters of the base that are trained beside adapters, in PEFT's file layout: whole modules and biases.

They are trained where they are, as sharded float32 masters like those of `full.py`: nothing is wrapped or copied, and
the base keeps no second version of them. PEFT's file holds them under their own names, and a bias of an adapted linear
under that of the adapter's ``base_layer``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from peft import PeftConfig
from torch import nn

from fsdp_qlora.adapters.names import ADAPTER, IN_FILE, adapter_parameters, base_name, trainable_parameters
from fsdp_qlora.config.choices import NONE
from fsdp_qlora.errors import PlanError
from fsdp_qlora.shapes.linears import ModelShapes
from fsdp_qlora.shapes.modules import parameters_in, require_trainable
from fsdp_qlora.shapes.tokens import TOKEN_ROWS


def whole_parameters(shapes: ModelShapes, modules: Sequence[str]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return module -> name in PEFT's file -> shape."""
    trained: dict[str, dict[str, tuple[int, ...]]] = {name: {} for name in modules}
    for name, shape in parameters_in(shapes, modules).items():
        trained[name.rpartition(".")[0]][IN_FILE + name] = shape
    return trained


def trained_biases(
    shapes: ModelShapes, bias: str, targets: Collection[str], modules: Collection[str]
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return module -> name in PEFT's file -> shape of the biases that ``lora.bias`` has trained.

    Args:
        shapes: the model.
        bias: ``none``, ``all`` or ``lora_only``.
        targets: the linears with an adapter.
        modules: the modules that are trained whole, biases included.

    Raises:
        PlanError: if there are none, or one cannot be trained.
    """
    if bias == NONE:
        return {}
    owners = [name.removesuffix(".bias") for name in shapes.parameters if name.endswith(".bias")]
    owners = [name for name in owners if name not in modules and (bias == "all" or name in targets)]
    require_trainable("lora.bias", shapes, (f"{name}.bias" for name in owners))
    if not owners:
        which = "no linear with an adapter" if bias == "lora_only" else "nothing in this model"
        raise PlanError(f"lora.bias: {which} has a bias to train; set it to none.")
    return {
        name: {IN_FILE + name + (".base_layer.bias" if name in targets else ".bias"): shapes.parameters[f"{name}.bias"]}
        for name in owners
    }


def train_parameters(base: nn.Module, names: Collection[str]) -> None:
    """Make these parameters of a meta model, with adapters already attached, trained float32 ones."""
    for name, parameter in base.named_parameters():
        if base_name(name) in names:
            parameter.data = parameter.data.to(torch.float32)
            parameter.requires_grad_(True)


def require_apart(modules: Collection[str], targets: Iterable[str], key: str) -> None:
    """Check that no module is trained whole and has an adapter that the setting ``key`` asked for.

    Raises:
        PlanError: naming the first that does.
    """
    if both := next((name for name in targets if name in modules), None):
        raise PlanError(
            f"lora.modules_to_save: {both} would be trained whole, and {key} gives it an adapter too; leave it out of "
            "one of them."
        )


def as_saved(config: PeftConfig, modules: Sequence[str], shapes: ModelShapes, model: nn.Module) -> PeftConfig:
    """Return ``config`` with ``modules_to_save``, so that PEFT trains the same modules of ``model``.

    A table that embedding and head share is saved under both names, as PEFT does it with ``ensure_weight_tying``.
    """
    if not modules:
        return config
    names = [*modules, *([shapes.head] if shares_trained_table(shapes, modules) and shapes.head not in modules else [])]
    names = _heads_whole(names, model, config.task_type)
    config.modules_to_save = _as_peft_matches(names, model)  # type: ignore[attr-defined]
    if shares_trained_table(shapes, modules) and hasattr(config, "ensure_weight_tying"):
        config.ensure_weight_tying = True  # type: ignore[attr-defined]
    return config


def shares_trained_table(shapes: ModelShapes, modules: Collection[str]) -> bool:
    """Whether a table that embedding and head share is trained."""
    return shapes.tied and shapes.embedding in modules


def with_head(
    tensors: Mapping[str, torch.Tensor], shapes: ModelShapes, modules: Collection[str]
) -> dict[str, torch.Tensor]:
    """Return the tensors of PEFT's file: a shared table that is trained is in it twice."""
    if not shares_trained_table(shapes, modules):
        return dict(tensors)
    embedding, head = (f"{IN_FILE}{name}.weight" for name in (shapes.embedding, shapes.head))
    return {**tensors, head: tensors[embedding].clone()}


def within(name: str, modules: Collection[str]) -> bool:
    """Whether a tensor of PEFT's file, called ``name`` there, is one that these modules own."""
    return name.startswith(IN_FILE) and base_name(name).rpartition(".")[0] in modules


def whole_in_file(names: Iterable[str], adapters: Collection[str], endings: Sequence[str]) -> tuple[str, ...]:
    """Return the modules that own tensors of PEFT's file which are no adapter's.

    Args:
        names: the names of all tensors in the file.
        adapters: endings of the names of adapters' tensors.
        endings: the config's ``modules_to_save``; PEFT compares ends of names without regard to dots.
    """
    owners: dict[str, None] = {}
    for name in names:
        if not name.startswith(IN_FILE) or name.endswith(tuple(f".{ending}" for ending in adapters)):
            continue
        owner = outer = name.removeprefix(IN_FILE).rpartition(".")[0]
        while outer and not outer.endswith(tuple(endings)):
            outer = outer.rpartition(".")[0]
        if outer:
            owners[owner] = None
    return tuple(owners)


def without_copies(stored: Any, names: Collection[str], trained: Collection[str], modules: Collection[str]) -> set[str]:
    """Return the names in an open PEFT file without the second one of a table that embedding and head share.

    Args:
        stored: the open file.
        names: the names of its tensors.
        trained: the names of the model's trained tensors.
        modules: the modules that the adapter trained whole.
    """
    tables = [name for name in trained if name in names and within(name, modules)]
    others = [name for name in names if name not in trained and within(name, modules)]
    return set(names) - {
        name
        for name in others
        if any(torch.equal(stored.get_tensor(name), stored.get_tensor(table)) for table in tables)
    }


def trained_whole(model: nn.Module) -> list[str]:
    """Return the names, in PEFT's file, of the base's own parameters that a model with an adapter trains."""
    own = {name for name, _ in adapter_parameters(model, ADAPTER)}
    return [name for name, _ in trainable_parameters(model) if name not in own and not name.endswith(TOKEN_ROWS)]


_HEADS, _HEAD_TASKS = ("classifier", "score"), ("SEQ_CLS", "TOKEN_CLS")
"""What PEFT trains whole by itself, in models of these tasks."""


def _heads_whole(names: Sequence[str], model: nn.Module, task: Any) -> list[str]:
    """Return the names with a head of several layers (RoBERTa's ``classifier``) as one: PEFT would wrap it twice."""
    if task not in _HEAD_TASKS:
        return list(names)
    heads = [name for name, _ in model.named_modules() if name.endswith(_HEADS)]
    return list(dict.fromkeys(next((h for h in heads if f"{n}.".startswith(f"{h}.")), n) for n in names))


def _as_peft_matches(names: Sequence[str], model: nn.Module) -> list[str]:
    """Return the last parts of the names if PEFT takes them for exactly these modules, else the whole names.

    PEFT compares ends of names without regard to dots: its ``norm`` also means ``input_layernorm``.
    """
    own = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for form in (sorted({name.rpartition(".")[2] for name in names}), sorted(names)):
        if {name for name in own if name.endswith(tuple(form))} == set(names):
            return form
    raise PlanError(f"lora.modules_to_save: PEFT would take more modules than {', '.join(names)} for these names.")
