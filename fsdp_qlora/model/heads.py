"""Heads that no file holds: which modules of a task's model are trained whole, and their first values.

transformers draws them in ``from_pretrained``; so does `draw_new`, by the same code, from the run's seed. A module that
is drawn is always trained: an adapter without it would be worth nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from fsdp_qlora.distributed.seeds import seed_of
from fsdp_qlora.errors import ModelError
from fsdp_qlora.model.construct import initialize, with_owners


def head_modules(model: PreTrainedModel, drawn: Iterable[str] = ()) -> tuple[str, ...]:
    """Return the modules that own parameters outside the base model, or one of the ``drawn`` ones, in order."""
    inside, chosen = f"{model.base_model_prefix}.", set(drawn)
    owners = [n.rpartition(".")[0] for n, _ in model.named_parameters() if n in chosen or not n.startswith(inside)]
    if "" in owners:
        raise ModelError(f"{type(model).__name__}: its head is a parameter of the model itself, which is not trained.")
    return tuple(dict.fromkeys(owners))


def drawn_modules(model: PreTrainedModel, drawn: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    """Return the modules that own ``drawn`` parameters and not the table of tokens, which the files hold.

    Beside that table, upstream starts a masked language model's bias at zero, where it stays.

    Raises:
        ModelError: if something else is drawn beside the table.
    """
    head = model.get_output_embeddings()
    table = next((name for name, module in model.named_modules() if module is head), "")
    owners = dict.fromkeys(name.rpartition(".")[0] for name in drawn)
    beside = {owner for owner in owners if f"{table}.".startswith(f"{owner}.")}
    for name, value in drawn.items():
        if name.rpartition(".")[0] in beside and bool(value.any()):
            raise ModelError(f"{type(model).__name__}: {name} is in no file, and cannot be trained beside {table}.")
    return tuple(owner for owner in owners if owner not in beside)


@torch.no_grad()
def draw_new(model: PreTrainedModel, names: Iterable[str], seed: int) -> dict[str, torch.Tensor]:
    """Return first values of parameters that no file holds, float32 on the CPU, as transformers' own code draws them.

    Args:
        model: the model as transformers builds it, on meta; it is not changed.
        names: the parameters.
        seed: the run's seed; each module gets one of its own, so the values do not depend on what else is drawn.

    Raises:
        ModelError: if upstream's code gives one of them no value.
    """
    wanted, values = set(names), dict[str, torch.Tensor]()
    owners = {module: owner for owner, module in with_owners(model)}
    for path, module in model.named_modules():
        own = {child: f"{path}.{child}" for child, _ in module.named_parameters(recurse=False)}
        if not wanted.intersection(own.values()):
            continue
        real = _real(module)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(seed, path))
            initialize(owners[module], real)
        for child, name in own.items():
            if name in wanted:
                values[name] = real.get_parameter(child).detach()
    if empty := [name for name in wanted if name not in values or not bool(torch.isfinite(values[name]).all())]:
        raise ModelError(f"{type(model).__name__}: {min(empty)} is in no file, and upstream's code gives it no value.")
    return values


def compute(model: PreTrainedModel, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Return the values of parameters that transformers' own code computes instead of saving, float32 on the CPU.

    Raises:
        ModelError: if they are drawn rather than computed.
    """
    values, again = (draw_new(model, names, seed) for seed in (0, 1))
    if odd := [name for name, value in values.items() if not torch.equal(value, again[name])]:
        raise ModelError(f"{type(model).__name__}: {min(odd)} is in no file, and upstream's code draws it at random.")
    return values


def _real(module: nn.Module) -> nn.Module:
    """Return a copy of a module's own parameters on the CPU, not a number each."""
    real = copy.copy(module)
    real._parameters = {
        name: None if value is None else nn.Parameter(torch.full(value.shape, torch.nan, dtype=torch.float32))
        for name, value in module._parameters.items()
    }
    return real
