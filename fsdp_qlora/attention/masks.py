"""Puts other functions in place of those that make masks, for a while, by transformers' own registry."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import AttentionMaskInterface


@contextmanager
def masks_by(functions: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Make the masks of these implementations of attention by other functions."""
    masks = AttentionMaskInterface()
    own = {name: masks[name] for name in functions}
    for name, function in functions.items():
        AttentionMaskInterface.register(name, function)
    try:
        yield
    finally:
        for name, function in own.items():
            AttentionMaskInterface.register(name, function)
