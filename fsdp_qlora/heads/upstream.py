"""Runs or measures what a model's own ``forward`` does before and after its output head.

Families scale logits (Cohere, Granite, HyperCLOVA X, MPT), cap them (Gemma), add a bias (BART), cut off padded columns,
or project and normalise the decoder's output before the head (BERT). None of this is guessed from config keys. For the
part before the head, upstream's ``forward`` runs and is stopped where it calls the head. For the part after it, the
same ``forward`` runs with decoder and head replaced by stand-ins that return given values. If that part is just a
factor and a soft cap, the head's fused loss applies them; otherwise upstream's code runs on each chunk of logits.

The stand-ins are placed in shallow copies of the modules; the model itself is never modified.
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
"""Number of logits on which the code after the head is probed; odd, so that zero is one of them."""
_EQUAL = 1e-6


@dataclass(frozen=True)
class AfterHead:
    """What follows the head's product: ``softcap * tanh(scale * x / softcap)``, or ``code``."""

    scale: float = 1.0
    softcap: float | None = None
    code: Callable[[torch.Tensor], torch.Tensor] | None = None
    """Upstream's own code, ``[tokens, vocab]`` -> ``[tokens, columns]``, if it does more than scale and cap."""


class _Reached(Exception):  # noqa: N818 - not an error: exits upstream's forward early
    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _StandIn(nn.Module):
    """Replaces a module of the model, and forwards access to that module's attributes (such as a weight's dtype)."""

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        self._like = (like,)  # in a tuple, so that it is not registered as a child

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what ``forward`` does, without hooks: what observes modules would take it for a part of the model."""
        return self.forward(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            attribute = getattr(self._like[0], name)
            if isinstance(attribute, nn.Module):  # upstream calls into a part of it, so it replaces too much
                raise
            return attribute


class _Stop(_StandIn):
    """Replaces the head, and stops ``forward`` with the head's input."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        raise _Reached(hidden)


class _Give(_StandIn):
    """Replaces the head or the decoder, and returns a given value whatever the arguments."""

    def __init__(self, like: nn.Module, given: Any) -> None:
        super().__init__(like)
        self._given = given

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._given


class _Output(BaseModelOutputWithPast):
    """A decoder's output with hidden states only; any other attribute that ``forward`` reads is None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def head_input(model: PreTrainedModel, **inputs: Any) -> torch.Tensor:
    """Return the input of the output head in ``model``'s own ``forward``: ``[rows, length, hidden]``.

    Raises:
        ModelError: if ``forward`` ends without calling the head.
    """
    head = model.get_output_embeddings()
    assert head is not None
    try:
        _with(model, {_head_name(model): _Stop(head)}).forward(**inputs)
    except _Reached as reached:
        return reached.hidden
    raise _not_called(model)


def _not_called(model: PreTrainedModel) -> ModelError:
    name = type(model).__name__
    return ModelError(f"{name}: its forward does not call the output head; its loss cannot be computed.")


def after_head(model: PreTrainedModel) -> AfterHead:
    """Return what ``model``'s own ``forward`` does after the head's product; the model may be on meta.

    Raises:
        ModelError: if there is no linear head, or ``forward`` cannot be run with stand-ins for decoder and head.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ModelError(f"{type(model).__name__}: it has no linear output head; its loss cannot be computed.")
    grid = torch.linspace(-30, 30, _PROBES)
    raw = grid[torch.arange(head.out_features) % _PROBES][None].contiguous()
    with torch.no_grad():
        code = _code_after(model)
        try:
            given = code(raw)
        except (RuntimeError, NotImplementedError):  # it uses weights, which are still on meta
            return AfterHead(code=_code_after(model))
    if given.is_meta and not raw.is_meta:
        raise _not_called(model)
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
    for key, value in config.to_dict().items():  # prefer the exact value in the config to the measured slope
        if isinstance(value, int | float) and value and ("scal" in key or "mult" in key):
            exact += [float(value), 1.0 / value]
    near = [value for value in exact if abs(value - slope) < 1e-5 * abs(slope)] or [slope]
    return [(near[0], None), *((scale, float(cap)) for cap in caps for scale in dict.fromkeys((1.0, *near)))]


def _has_own_buffers(model: PreTrainedModel) -> bool:
    """Whether the outermost module has persistent buffers, which files may fill (BART's bias on the logits)."""
    return any(name not in in_no_file(model) for name, _ in model.named_buffers(recurse=False))


def _code_after(model: PreTrainedModel) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return upstream's code after the head as a function of the head's product ``[tokens, vocab]``."""
    head, name = model.get_output_embeddings(), _head_name(model)
    backbones = _backbones(model)
    assert head is not None

    width = getattr(model.config.get_text_config(), "hidden_size", None) or head.in_features

    def run(raw: torch.Tensor) -> torch.Tensor:
        # A head's own layers before the product (BERT's transform) run on this: while they are on meta, there. The
        # head is another module once its loss is fused.
        now: Any = model.get_output_embeddings()
        like = now.weight if now.weight.is_meta else raw
        hidden = torch.zeros(1, raw.shape[0], width, device=like.device, dtype=like.dtype)  # type: ignore[arg-type]
        ids = torch.zeros(1, raw.shape[0], dtype=torch.long, device=raw.device)
        error: Exception | None = None
        for path in backbones:
            instead = {
                name: _Give(head, raw[None]),
                path: _Give(model.get_submodule(path), _Output(last_hidden_state=hidden)),
            }
            try:
                outputs = _with(model, instead).forward(**_inputs(model, ids, hidden), use_cache=False)
            except (AttributeError, TypeError, ValueError, IndexError, KeyError) as tried:
                error = tried
                continue
            if outputs.logits.shape[:2] == (1, raw.shape[0]):
                return outputs.logits[0]
        raise ModelError(
            f"{type(model).__name__}: the part of its forward after the output head cannot be run on its own ({error})."
        )

    return run


def _inputs(model: PreTrainedModel, ids: torch.Tensor, hidden: torch.Tensor) -> dict[str, Any]:
    """Return inputs for ``forward``; of an encoder-decoder, those of the decoder, so that the encoder does not run."""
    if not model.config.is_encoder_decoder:
        return {"input_ids": ids}
    return {"decoder_input_ids": ids, "encoder_outputs": _Output(last_hidden_state=hidden)}


def _backbones(model: PreTrainedModel) -> list[str]:
    """Return the paths of modules to try as the decoder: the outermost module around it, then the decoder itself.

    Where nothing is around the table of tokens (T5's), the decoder comes first.
    """
    names = {module: name for name, module in model.named_modules()}
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    around = names[table].partition(".")[0]
    inner = names.get(model.get_decoder(), "")
    order = (inner, around) if around == names[table] else (around, inner)  # type: ignore[index]
    return [path for path in dict.fromkeys(order) if path not in ("", names[head])]  # type: ignore[index]


def _head_name(model: PreTrainedModel) -> str:
    head = model.get_output_embeddings()
    return next(name for name, module in model.named_modules() if module is head)


def _with(model: nn.Module, instead: Mapping[str, nn.Module]) -> Any:
    """Return a shallow copy of ``model`` with the modules at the paths in ``instead`` replaced."""
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
