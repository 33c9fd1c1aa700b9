"""Profiler scopes around the modules of a transformers model that `fsdp_qlora.scopes` names.

The scopes are added by hooks, because the models' code is not ours, and only while a profiler runs, because they cost a
few microseconds per call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.profiler import record_function
from transformers import PreTrainedModel

from fsdp_qlora.scopes import ATTENTION_BLOCK, HEAD

Scoped = tuple[nn.Module, str]
"""(module, name of its scope)."""


def scoped_modules(model: PreTrainedModel) -> list[Scoped]:
    """Return the loss head and the attention modules."""
    scoped: list[Scoped] = [(m, ATTENTION_BLOCK) for m in model.modules() if type(m).__name__.endswith("Attention")]
    head = model.get_output_embeddings()
    return scoped if head is None else [*scoped, (head, HEAD)]


@contextmanager
def record_modules(modules: Sequence[Scoped]) -> Iterator[None]:
    """Within this context, record a scope for each call of the modules."""
    handles = [handle for module, name in modules for handle in _record(module, name)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _record(module: nn.Module, name: str) -> list[Any]:
    running: list[record_function] = []

    def enter(*_: Any) -> None:
        if torch.compiler.is_compiling():  # inside a compiled layer it would only break the graph
            return
        running.append(record_function(name))
        running[-1].__enter__()

    def leave(*_: Any) -> None:
        if not torch.compiler.is_compiling() and running:
            running.pop().__exit__(None, None, None)

    # Inside FSDP's own hooks, whose gathers are another phase; always called, as checkpointing may end a forward early.
    return [
        module.register_forward_pre_hook(enter),
        module.register_forward_hook(leave, prepend=True, always_call=True),
    ]
