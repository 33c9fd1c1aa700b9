"""What a model has read of a conversation: its KV cache, so that a turn feeds only the tokens that are new."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers.cache_utils import Cache, DynamicLayer


@dataclass
class Remembered:
    """The keys and values of one sequence of tokens, computed with one adapter.

    It takes as much memory between the turns as the conversation does while it is answered. On several ranks each has
    its own, of the same tokens.
    """

    ids: list[int] = field(default_factory=list)
    """The tokens that are in the cache."""
    adapter: str | None = None
    cache: Cache | None = None

    def take(self, ids: Sequence[int], adapter: str | None) -> Cache | None:
        """Return the cache, cut to the tokens with which ``ids`` begins, and forget it; None if it is of no use.

        One token is always left to feed: its logits are the first of the answer. A cache that keeps anything else than
        all keys (sliding windows, linear attention) cannot be cut, and is of use only as a whole.
        """
        cache, self.cache = self.cache, None
        if cache is None or adapter != self.adapter:
            return None
        shared = 0
        for old, new in zip(self.ids, ids[:-1], strict=False):
            if old != new:
                break
            shared += 1
        surplus = len(self.ids) - shared
        if not shared or (surplus and any(type(layer) is not DynamicLayer for layer in cache.layers)):
            return None
        if surplus:
            cache.crop(-surplus)
        return cache

    def keep(self, ids: Sequence[int], adapter: str | None, cache: Cache | None) -> None:
        """Remember ``cache``, which holds all of ``ids`` but the last few, which were not fed."""
        if cache is not None:
            self.ids, self.adapter, self.cache = list(ids[: cache.get_seq_length()]), adapter, cache
