"""The loss of an exported model on held-out rows, computed by plain transformers, in memory or from the disk."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from fsdp_qlora.checks.verdict import Verdict
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.data.loader import Piece, TokenRows
from fsdp_qlora.distributed.memory import host_memory
from fsdp_qlora.run.build import OpenedModel
from fsdp_qlora.run.inference import load_for_inference
from fsdp_qlora.run.tokens import tokenize
from fsdp_qlora.run.world import World

Logits = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""int64 ``[rows, length]`` and its attention mask -> ``[rows, length, vocab]``."""
MOST_ROWS = 64
"""Held-out rows to measure on."""
LEAST_ROWS = 8
"""Fewer say too little."""
MOST_SECONDS = 900.0
"""Longest estimated time of measuring both forms."""
_TOGETHER = 1024
"""Tokens, padding included, that go through the model at once; each time, a model on disk is read once."""
_SHARE = 0.6
"""Share of the machine's memory that the model may take; a larger one stays on disk, and each of its modules is read
when it is needed."""
_READ = 500e6
"""Bytes a second that a model on disk is taken to be read with."""


def held_out_rows(config: RunConfig, folder: Path, opened: OpenedModel, world: World) -> tuple[list[Piece] | None, str]:
    """Return rows to measure two forms of a model on, as ``(input_ids, learned)``; or None, and why there are none."""
    none = "no held-out rows (data.eval, or data.train with data.eval_fraction)"
    if config.data.train is None and config.data.eval is None:
        return None, none
    data = replace(config.data, train=config.data.train or config.data.eval)
    _, prepared = tokenize(replace(config, data=data), folder, opened, Verdict("eager"), world)
    if prepared is None or prepared.eval is None or not len(prepared.eval):
        return None, none
    held = TokenRows(prepared.eval)
    rows = [held.row(number) for number in range(min(MOST_ROWS, len(held)))]
    size, rate = _bytes(opened), _rate(opened.base.dtype)
    reading = 0.0 if fits_in_memory(opened) else size / _READ
    cost = 2 * 2 * _weights_a_token(opened) / rate
    seconds = [2 * reading * passes + cost * tokens for passes, tokens in _amounts(rows)]
    enough = sum(each <= MOST_SECONDS for each in seconds)
    if enough < min(LEAST_ROWS, len(rows)):
        needed = seconds[min(LEAST_ROWS, len(rows)) - 1]
        return None, f"{min(LEAST_ROWS, len(rows))} rows would take about {needed / 60:.0f} minutes"
    return rows[:enough], ""


def _amounts(rows: list[Piece]) -> Iterator[tuple[int, int]]:
    """Yield for each number of first rows how many forwards they take, and their tokens."""
    for count in range(1, len(rows) + 1):
        yield len(_groups(rows[:count])), sum(len(ids) for ids, _ in rows[:count])


def _bytes(opened: OpenedModel) -> int:
    return opened.base.dtype.itemsize * opened.plan.base_parameters


def fits_in_memory(opened: OpenedModel) -> bool:
    """Whether the base may be in memory as a whole; one that is larger stays on disk while it is measured."""
    return _bytes(opened) <= _SHARE * host_memory()[0]


def _weights_a_token(opened: OpenedModel) -> float:
    """Return the number of weights that a token is multiplied with."""
    shapes = opened.shapes
    idle = sum(x.numel * (1 - min(shapes.experts_per_token, x.count) / x.count) for x in shapes.linears if x.count > 1)
    return opened.plan.base_parameters - idle


def _groups(rows: list[Piece]) -> list[list[Piece]]:
    """Return the rows in groups of at most `_TOGETHER` tokens, padding included, or one row."""
    groups: list[list[Piece]] = []
    for row in sorted(rows, key=lambda row: len(row[0])):
        if groups and len(row[0]) * (len(groups[-1]) + 1) <= _TOGETHER:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _rate(dtype: torch.dtype) -> float:
    """Return the operations per second of a matrix product here."""
    matrix = torch.ones(1024, 1024, dtype=dtype)
    started, products = time.perf_counter(), 0
    while time.perf_counter() - started < 0.2:
        torch.mm(matrix, matrix)
        products += 1
    return products * 2 * 1024**3 / (time.perf_counter() - started)


@dataclass(frozen=True)
class Measured:
    """What a model does on held-out rows."""

    loss: float
    """Mean loss of the learned tokens, in nats."""
    difference: float | None = None
    """Largest absolute difference of its logits from a reference's, over all tokens; None: there was no reference."""


@torch.no_grad()
def measure(logits_of: Logits, rows: list[Piece], reference: Logits | None = None) -> Measured:
    """Return the loss of a model on rows of ``(input_ids, learned)``, and how far its logits are from ``reference``'s.

    Groups of rows are padded on the right, where no token of a causal model sees it.
    """
    total, count, difference = 0.0, 0, 0.0
    for group in _groups(rows):
        ids = pad_sequence([ids.long() for ids, _ in group], batch_first=True)
        learned = pad_sequence([learned for _, learned in group], batch_first=True)  # padding is not learned
        mask = pad_sequence([torch.ones(len(ids), dtype=torch.long) for ids, _ in group], batch_first=True)
        logits = logits_of(ids, mask)
        kept = learned[:, 1:]
        losses = nn.functional.cross_entropy(logits[:, :-1][kept].float(), ids[:, 1:][kept], reduction="none")
        total += float(losses.double().sum())
        count += int(kept.sum())
        if reference is not None:
            off = (logits.float() - reference(ids, mask).float())[mask.bool()]
            difference = max(difference, float(off.abs().max()))
    return Measured(total / count if count else math.nan, None if reference is None else difference)


@contextmanager
def stored_model(
    folder: Path, dtype: torch.dtype, offload: Path | None = None, adapter: Path | None = None
) -> Iterator[Logits]:  # fmt: skip
    """Load the model in ``folder`` with plain transformers on the CPU, with an adapter on it if one is given.

    With ``offload``, the model stays on disk, and accelerate reads each module when it is needed; ``offload`` is a
    folder for tensors that transformers converts. Not with an adapter: transformers' ``load_adapter`` leaves
    uninitialised numbers in the adapters of layers on disk.
    """
    assert offload is None or adapter is None
    on_disk: dict[str, Any] = {} if offload is None else {"device_map": {"": "disk"}, "offload_folder": offload}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, **on_disk)
    if adapter is not None:
        model.load_adapter(str(adapter))
    model.eval()
    yield lambda ids, mask: model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    if offload is not None:
        shutil.rmtree(offload, ignore_errors=True)  # the other form's would have the same names


def trained_model(config: RunConfig, adapter: Path, world: World) -> Logits:
    """Return the logits of the trained model, the adapter on the quantized base, on one rank."""
    config = replace(config, data=replace(config.data, train=None, eval=None))
    model = load_for_inference(config, adapter, world).model
    return lambda ids, _: model.logits(ids.to(model.device)).cpu()
