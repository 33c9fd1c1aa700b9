"""What blockwise attention keeps: arithmetic over its blocks of queries."""

from __future__ import annotations

from fsdp_qlora.shapes.linears import FLOAT32, ModelShapes

QUERY_BLOCK = 128
"""Queries (of one head) whose scores exist at the same time in blockwise attention."""
KEPT_SCORES_LENGTH = 1024
"""Up to so many tokens blockwise attention keeps its probabilities for backward; of longer ones it makes them again."""


def pairs_seen(length: int) -> int:
    """Return how many (query, key) pairs blocks of queries cover, each with the keys up to its own end.

    With 2 whole blocks and a rest, of a length of 300::

        queries    0..127    x keys 0..127        128 * 128
                 128..255    x keys 0..255        128 * 256     = 128 * 128 * (1 + 2)
                 256..299    x keys 0..299         44 * 300
    """
    whole, rest = length // QUERY_BLOCK, length % QUERY_BLOCK
    return QUERY_BLOCK * QUERY_BLOCK * whole * (whole + 1) // 2 + rest * length


def kept_scores(shapes: ModelShapes, attention: str, itemsize: int, length: int) -> int:
    """Return the bytes of probabilities that attention keeps for a token of a sequence of ``length``.

    Eager attention keeps them in float32 and in the activations' dtype, for all positions; blockwise attention those of
    each block of queries with the keys up to its end.
    """
    heads = shapes.num_attention_heads
    if attention == "eager":
        return heads * (itemsize + FLOAT32) * length
    if attention == "blockwise" and length <= KEPT_SCORES_LENGTH:
        return -(-heads * itemsize * pairs_seen(length) // length)
    return 0
