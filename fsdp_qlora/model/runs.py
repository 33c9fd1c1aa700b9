"""Runs a model's layers on meta, to find what they keep for backward and what their backward needs.

Layers of encoders, encoder-decoders and image models differ too much for arithmetic over names (`plan/activations.py`).
Tensors on meta have shapes and storages, but neither memory nor values, so a forward and a backward of each kind of
layer take some milliseconds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fsdp_qlora.adapters.peft_layers import META
from fsdp_qlora.attention.masks import masks_by
from fsdp_qlora.data.loader import NamedBatch
from fsdp_qlora.errors import typed_line
from fsdp_qlora.model.live import OneKernel, backward_peak, leaves_of, with_tensors
from fsdp_qlora.objectives import Objective
from fsdp_qlora.shapes.linears import ModelShapes
from fsdp_qlora.shapes.runs import ByLength, LayerRun

_log = logging.getLogger(__name__)


def with_runs(
    shapes: ModelShapes, model: PreTrainedModel, objective: Objective, folder: Path, length: int,
    on_accelerator: bool = False,
) -> ModelShapes:  # fmt: skip
    """Return the shapes with what each layer takes, if rows of the objective are no tokens of a causal model.

    Args:
        shapes: the model's.
        model: on meta, as transformers builds it; it is left as it is.
        objective: with its settings settled.
        folder: the model's.
        length: ``data.max_length``.
        on_accelerator: whether they would run on a GPU.

    Where upstream's code cannot be run without values, they are returned as they are, and a warning says so.
    """
    if objective.of_tokens or objective.stand_in(folder, model.config, 1, length) is None:
        return shapes
    length = min(length, shapes.max_positions or length)
    fixed = objective.row_length(folder, model.config) > 0
    least = max(4, length)
    lengths = [length] if fixed else [least, least // 2, least // 4]
    try:
        runs = [_run(model, shapes, objective, folder, size, on_accelerator) for size in lengths]
        layers = list(zip(*([run[name] for name in shapes.layers] for run in runs), strict=True))
    except Exception as error:  # upstream's code may read values, which raises anything on meta
        _warn(type(model).__name__, typed_line(error))
        return shapes
    return replace(shapes, runs=tuple(_by_length(lengths, each) for each in layers))


@cache
def _warn(name: str, why: str) -> None:
    """Say once in a process that the plan estimates."""
    _log.warning(
        "%s: its layers cannot be run without values (%s), so the plan estimates what they keep by the sizes of their "
        "linears", name, why,
    )  # fmt: skip


def _run(
    model: PreTrainedModel, shapes: ModelShapes, objective: Objective, folder: Path, length: int, on_accelerator: bool
) -> dict[str, _Layer]:
    """Return what each layer takes for a row of ``length``."""
    own: Any = deepcopy(model).to_empty(device=META)
    for config in (module.config for module in own.modules() if hasattr(module, "config")):
        config.use_cache = False  # a layer that is run again would find keys and values there
    run, tensors = _Run(own.train(), shapes), objective.stand_in(folder, model.config, 1, length)
    assert tensors is not None
    run.go(objective, {name: tensor.to(META) for name, tensor in tensors.items()}, on_accelerator)
    return run.layers


@dataclass
class _Layer:
    """What was seen of one layer, at one length."""

    tokens: int
    enters: int
    calls: int = 0
    tensors: list[int] = field(default_factory=list)
    inputs: dict[str, tuple[int, int]] = field(default_factory=dict)
    products: int = 0
    transient: int = 0
    shared: int = 0


@dataclass(frozen=True)
class _Begun:
    """A layer's forward that has not ended."""

    layer: _Layer
    within: ExitStack
    leaves: list[torch.Tensor]
    kept: list[torch.Tensor]


def _by_length(lengths: Sequence[int], layers: Sequence[_Layer]) -> LayerRun:
    def through(number: Callable[[_Layer], int]) -> ByLength:
        return ByLength.through([(length, number(layer)) for length, layer in zip(lengths, layers, strict=True)])

    inputs = {
        name: (number, through(lambda layer, name=name: layer.inputs[name][1]))
        for name, (number, _) in layers[0].inputs.items()
    }
    return LayerRun(
        through(lambda layer: layer.tokens),
        through(lambda layer: layer.enters),
        tuple(through(lambda layer, at=at: layer.tensors[at]) for at in range(len(layers[0].tensors))),
        inputs,
        through(lambda layer: layer.products),
        through(lambda layer: layer.transient),
        layers[0].calls,
        through(lambda layer: layer.shared),
    )


class _Run:
    """One forward of the whole model, layer by layer, and one backward of each kind of layer."""

    def __init__(self, model: PreTrainedModel, shapes: ModelShapes) -> None:
        self._model, self._shapes = model, shapes
        self._linears = {linear.name for linear in shapes.linears if not linear.stacked}
        self._seen: dict[int, torch.UntypedStorage] = {}
        """Storages that were seen: each is one object, whose number is its own, for as long as it is held."""
        self._counted: set[int] = set()
        """Storages that a layer keeps."""
        self._read: dict[int, int] = {}
        """Storage -> number of an input of linears."""
        self._transient: dict[Any, int] = {}
        self._handed_on: set[int] = set()
        """Storages that a layer hands on to later ones, beside its output."""
        self._own = {self._note(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self._begun: _Begun | None = None
        self.layers: dict[str, _Layer] = {}

    def go(self, objective: Objective, tensors: Mapping[str, torch.Tensor], on_accelerator: bool) -> None:
        """Run the objective's forward on tensors on meta."""
        with ExitStack() as stack:
            for name, module in self._model.named_modules():
                if name in self._linears:
                    stack.callback(module.register_forward_hook(partial(self._note_linear, name)).remove)
                if name in self._shapes.layers:
                    before = module.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True)
                    after = module.register_forward_hook(self._leave, with_kwargs=True)
                    stack.callback(before.remove)
                    stack.callback(after.remove)
            stack.enter_context(masks_by({"eager": _mask, "sdpa": _bool_mask}))
            stack.enter_context(OneKernel(on_accelerator))
            stack.enter_context(torch.no_grad())
            objective.sums(_OnMeta(self._model), NamedBatch(0, tensors))

    def _enter(self, name: str, layer: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Begin to note what a layer keeps: it runs alone, on leaves of its own."""
        hidden = next(x for x in leaves_of((args, kwargs)) if _is_float(x))
        states = [x for x in leaves_of((args, kwargs)) if _is_float(x) and _alike(x, hidden)]
        leaves = {id(x): x.detach().requires_grad_() for x in states}
        kept: list[torch.Tensor] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            kept.append(tensor)
            return tensor

        within = ExitStack()
        within.enter_context(torch.enable_grad())
        within.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
        mine = self.layers.setdefault(name, _Layer(0, hidden.nbytes))
        mine.tokens += hidden.shape[:-1].numel()  # ALBERT calls one layer several times
        mine.calls += 1
        self._begun = _Begun(mine, within, list(leaves.values()), kept)
        return with_tensors(lambda x: leaves.get(id(x), x), (args, kwargs))

    def _leave(self, layer: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        """Note what the layer kept, and run it again for the peak of its backward if it is of a new kind."""
        assert self._begun is not None
        begun, self._begun = self._begun, None
        mine = begun.layer
        begun.within.close()
        for tensor in begun.kept:
            storage = self._note(tensor)
            if storage not in self._own and storage not in self._counted:
                self._counted.add(storage)
                mine.tensors.append(tensor.untyped_storage().nbytes())
        numbers = {number for storage, number in self._read.items() if storage in self._counted}
        mine.inputs = {linear: known for linear, known in mine.inputs.items() if known[0] not in numbers}
        key = (
            type(layer),
            mine.tokens,
            mine.enters,
            tuple(mine.tensors),
            tuple(size for _, size in mine.inputs.values()),
        )
        if key not in self._transient:
            self._transient[key] = backward_peak(lambda: layer.forward(*args, **kwargs), begun.leaves)  # no hooks
        mine.transient = self._transient[key]
        for tensor in [x for x in leaves_of(out) if _is_float(x)][1:]:
            if (storage := self._note(tensor)) not in self._handed_on:
                self._handed_on.add(storage)
                mine.shared += tensor.untyped_storage().nbytes()
        return with_tensors(torch.Tensor.detach, out)

    def _note_linear(self, name: str, module: nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> None:
        if self._begun is None:
            return
        layer = self._begun.layer
        storage = self._note(args[0])
        number = self._read.setdefault(storage, len(self._read))
        if name not in layer.inputs:
            layer.inputs[name] = number, args[0].untyped_storage().nbytes()
        elif storage not in self._counted:  # called again: all of its inputs are kept
            layer.tensors.append(args[0].untyped_storage().nbytes())
            self._counted.add(storage)
        layer.products += out.nbytes

    def _note(self, tensor: torch.Tensor) -> int:
        """Return the number of a tensor's storage, which stays its own from now on."""
        storage = tensor.untyped_storage()
        self._seen[id(storage)] = storage
        return id(storage)


def _mask(
    batch_size: int, q_length: int, kv_length: int, dtype: torch.dtype, device: Any, **_: Any
) -> torch.Tensor:  # fmt: skip
    """Make a mask without looking at values, as for rows of which some are padded."""
    return torch.empty(batch_size, 1, q_length, kv_length, dtype=dtype, device=device)


def _bool_mask(**given: Any) -> torch.Tensor:
    return _mask(**{**given, "dtype": torch.bool})


class _OnMeta(nn.Module):
    """A model under the methods that objectives call."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.base = model

    def outputs(self, **inputs: Any) -> Any:
        """Run upstream's forward."""
        dtype = self.base.dtype
        return self.base(**{name: x.to(dtype) if _is_float(x) else x for name, x in inputs.items()})

    def losses(self, labels: torch.Tensor, supervised: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """Run upstream's forward, which shifts the labels of encoder-decoders."""
        if "attention_mask" not in inputs:  # Whisper's would look for rows in one sequence, by the values of positions
            inputs |= {"decoder_attention_mask": torch.ones_like(labels)}
        self.outputs(**inputs, labels=labels)
        return torch.empty(len(supervised), device=META)


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _alike(states: torch.Tensor, hidden: torch.Tensor) -> bool:
    """Whether a gradient flows to a layer's argument: its input, and what an encoder made."""
    return states is hidden or (states.dim() == hidden.dim() == 3 and states.shape[-1] == hidden.shape[-1])
