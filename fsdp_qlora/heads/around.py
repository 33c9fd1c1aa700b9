"""What a model's own ``forward`` does before and after its output head: run as upstream wrote it, or measured.

Families scale logits (Cohere, Granite, HyperCLOVA X, MPT), cap them (Gemma), add a bias (BART), cut off padded columns,
or project and normalise what the decoder gives before the head sees it (BERT). None of this is guessed from config
keys. What comes before the head is upstream's ``forward`` itself, stopped where it calls the head. What comes after is
the same ``forward`` with decoder and head replaced by stand-ins that hand out what they are given; where that turns out
to be a factor and a soft cap, the fused loss of the head does it, else upstream's code runs on each chunk of logits.

The stand-ins go into shallow copies of the modules on the way; the model itself is never touched.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from fsdp_qlora.errors import ModelError
from fsdp_qlora.load.buffers import in_no_file

_PROBES = 61
"""Logits that the code after the head is tried on; odd, so that zero is one of them."""
_EQUAL = 1e-6


@dataclass(frozen=True)
class AfterHead:
    """What becomes of the head's product: ``softcap * tanh(scale * x / softcap)``, or what ``code`` makes of it."""

    scale: float = 1.0
    softcap: float | None = None
    code: Callable[[torch.Tensor], torch.Tensor] | None = None
    """Upstream's own code, ``[tokens, vocab]`` -> ``[tokens, columns]``, where scale and cap are not all of it."""


class _Reached(Exception):  # noqa: N818 - no error: the way out of upstream's forward
    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _StandIn(nn.Module):
    """In the place of a module of the model; upstream may ask it for the module's attributes (a weight's dtype)."""

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        self._like = (like,)  # in a tuple: no child of this module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            found = getattr(self._like[0], name)
            if isinstance(found, nn.Module):  # upstream wants a part of it: it stands for too much
                raise
            return found


class _Stop(_StandIn):
    """In the head's place: ends ``forward`` with what the head is given."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        raise _Reached(hidden)


class _Give(_StandIn):
    """In the place of the head or the decoder: gives what it is told to, whatever it is asked."""

    def __init__(self, like: nn.Module, given: Any) -> None:
        super().__init__(like)
        self._given = given

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._given


class _Output(BaseModelOutputWithPast):
    """A decoder's output that has nothing but hidden states, whatever else upstream's ``forward`` asks it for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def head_input(model: PreTrainedModel, **inputs: Any) -> torch.Tensor:
    """Return what ``model``'s own ``forward`` gives its output head for ``inputs``: ``[rows, length, hidden]``.

    Raises:
        ModelError: if ``forward`` ends without calling the head.
    """
    head = model.get_output_embeddings()
    assert head is not None
    try:
        _with(model, {_head_name(model): _Stop(head)}).forward(**inputs)
    except _Reached as reached:
        return reached.hidden
    raise ModelError(f"{type(model).__name__}: its forward does not call the output head; its loss cannot be computed.")


def after_head(model: PreTrainedModel) -> AfterHead:
    """Return what ``model``'s own ``forward`` makes of the head's product; the model may be on meta.

    Raises:
        ModelError: if ``forward`` cannot be run with stand-ins for decoder and head.
    """
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    grid = torch.linspace(-30, 30, _PROBES)
    raw = grid[torch.arange(head.out_features) % _PROBES][None].contiguous()
    with torch.no_grad():
        code = _code_after(model)
        try:
            given = code(raw)
        except (RuntimeError, NotImplementedError):  # it uses weights, which are not here yet
            return AfterHead(code=_code_after(model))
    code = _code_after(model)
    if given.shape != raw.shape or _has_own_buffers(model):
        return AfterHead(code=code)
    slope = float(given[0, raw[0] == 1.0][0]) if bool((raw == 1.0).any()) else 1.0
    for scale, softcap in _candidates(model.config.get_text_config(), slope):
        wanted = raw * scale if softcap is None else softcap * torch.tanh(raw * scale / softcap)
        if float((given.float() - wanted).abs().max()) <= _EQUAL * float(wanted.abs().max()):
            return AfterHead(scale, softcap)
    return AfterHead(code=code)


def _candidates(config: Any, slope: float) -> list[tuple[float, float | None]]:
    caps = [v for k, v in config.to_dict().items() if re.search("soft_?cap", k) and isinstance(v, int | float) and v]
    exact = [1.0]
    for key, value in config.to_dict().items():  # the slope as the config spells it, free of rounding
        if isinstance(value, int | float) and value and ("scal" in key or "mult" in key):
            exact += [float(value), 1.0 / value]
    near = [value for value in exact if abs(value - slope) < 1e-5 * abs(slope)] or [slope]
    return [(near[0], None), *((scale, float(cap)) for cap in caps for scale in dict.fromkeys((1.0, *near)))]


def _has_own_buffers(model: PreTrainedModel) -> bool:
    """Whether the model's outermost module holds values that files may change (BART's bias on the logits)."""
    return any(name not in in_no_file(model) for name, _ in model.named_buffers(recurse=False))


def _code_after(model: PreTrainedModel) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return upstream's code after the head as a function of its product ``[tokens, vocab]``."""
    head, name = model.get_output_embeddings(), _head_name(model)
    backbones = _backbones(model)
    assert head is not None

    width = getattr(model.config.get_text_config(), "hidden_size", None) or head.in_features

    def run(raw: torch.Tensor) -> torch.Tensor:
        hidden = raw.new_zeros(1, raw.shape[0], width)  # type: ignore[arg-type]
        ids = torch.zeros(1, raw.shape[0], dtype=torch.long, device=raw.device)
        error: Exception | None = None
        for path in backbones:
            instead = {
                name: _Give(head, raw[None]),
                path: _Give(model.get_submodule(path), _Output(last_hidden_state=hidden)),
            }
            try:
                outputs = _with(model, instead).forward(input_ids=ids, use_cache=False)
            except (AttributeError, TypeError, ValueError, IndexError, KeyError) as tried:
                error = tried
                continue
            if outputs.logits.shape[:2] == (1, raw.shape[0]):
                return outputs.logits[0]
        raise ModelError(
            f"{type(model).__name__}: what its forward does after the output head cannot be run by itself ({error})."
        )

    return run


def _backbones(model: PreTrainedModel) -> list[str]:
    """Return the paths of what may stand for the decoder: the outermost module around it, then the decoder itself."""
    names = {module: name for name, module in model.named_modules()}
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    around = names[table].partition(".")[0]
    inner = names.get(model.get_decoder(), "")
    return [path for path in dict.fromkeys((around, inner)) if path not in ("", names[head])]  # type: ignore[index]


def _head_name(model: PreTrainedModel) -> str:
    head = model.get_output_embeddings()
    return next(name for name, module in model.named_modules() if module is head)


def _with(model: nn.Module, instead: Mapping[str, nn.Module]) -> Any:
    """Return a shallow copy of ``model`` with other modules at the paths ``instead``; nothing else is copied."""
    made = copy.copy(model)
    made._modules = dict(model._modules)
    nested: dict[str, dict[str, nn.Module]] = {}
    for path, module in instead.items():
        child, _, rest = path.partition(".")
        if rest:
            nested.setdefault(child, {})[rest] = module
        else:
            made._modules[child] = module
    for child, inside in nested.items():
        made._modules[child] = _with(made._modules[child], inside)  # type: ignore[arg-type]
    return made
