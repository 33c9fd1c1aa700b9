"""Memory that attention keeps: arithmetic over blocks of queries."""

from __future__ import annotations

from fsdp_qlora.shapes.linears import FLOAT32, ModelShapes

QUERY_BLOCK = 128
"""Number of queries (per head) whose scores exist at the same time in blockwise attention."""
KEPT_SCORES_LENGTH = 1024
"""Blockwise attention keeps probabilities for backward up to this length, and recomputes them beyond it."""


def pairs_seen(length: int) -> int:
    """Return the number of (query, key) pairs covered by blocks of queries, each with the keys up to its own end.

    A length of 300 gives two whole blocks and a rest::

        queries    0..127    x keys 0..127        128 * 128
                 128..255    x keys 0..255        128 * 256     = 128 * 128 * (1 + 2)
                 256..299    x keys 0..299         44 * 300
    """
    whole, rest = length // QUERY_BLOCK, length % QUERY_BLOCK
    return QUERY_BLOCK * QUERY_BLOCK * whole * (whole + 1) // 2 + rest * length


def kept_scores(shapes: ModelShapes, attention: str, itemsize: int, length: int) -> int:
    """Return the bytes of probabilities that attention keeps per token in a sequence of ``length``.

    Eager attention keeps them for all positions, in float32 and in the activations' dtype; blockwise attention keeps
    those of each block of queries with the keys up to its end.
    """
    heads = shapes.num_attention_heads
    if attention == "eager":
        return heads * (itemsize + FLOAT32) * length
    if attention == "blockwise" and length <= KEPT_SCORES_LENGTH:
        return -(-heads * itemsize * pairs_seen(length) // length)
    return 0
