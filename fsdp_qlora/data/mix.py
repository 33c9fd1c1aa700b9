"""How many sequences of each source an epoch of a mixture contains: exact, deterministic counts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fsdp_qlora.errors import DataError


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Split ``total`` into integers in proportion to ``weights`` (largest remainder method, ties to the first)."""
    shares = [total * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - shares[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def mixture_counts(
    sizes: Sequence[int], weights: Sequence[float] | None, temperature: float, counts: Sequence[int] | None
) -> list[int] | None:
    """Return the number of sequences per epoch from each source; None if each sequence occurs once.

    Args:
        sizes: number of sequences in each source.
        weights: relative shares of the sources.
        temperature: makes the shares ``size ** (1 / temperature)`` (1 = proportional, large = equal); 0 = not used.
        counts: the numbers themselves.

    Raises:
        DataError: if there are not as many values as sources, or a source to draw from is empty.
    """
    given = [("data.weights", weights), ("data.counts", counts)]
    for key, values in given:
        if values is not None and len(values) != len(sizes):
            raise DataError(f"{key}: {len(values)} numbers for {len(sizes)} sources in data.train.")
    if counts is not None:
        wanted = list(counts)
    elif weights is not None:
        wanted = apportion(sum(sizes), weights)
    elif temperature > 0:
        wanted = apportion(sum(sizes), [size ** (1 / temperature) if size else 0.0 for size in sizes])
    else:
        return None
    for number, (size, count) in enumerate(zip(sizes, wanted, strict=True)):
        if count and not size:
            raise DataError(
                f"data.train: source {number + 1} has no sequence to learn from, but {count} are requested."
            )
    return wanted


def draw(sources: np.ndarray, wanted: Sequence[int], seed: int) -> np.ndarray:
    """Return sequence indices, ``wanted[i]`` of them from source ``i``; repeats within a source differ by at most one.

    Args:
        sources: int ``[sequences]``, the source of each sequence.
        wanted: number of sequences to draw from each source.
        seed: decides which sequences are drawn once more than the others.
    """
    parts = []
    for number, count in enumerate(wanted):
        own = np.flatnonzero(sources == number)
        if not count:
            continue
        order = np.random.Generator(np.random.PCG64([seed, number])).permutation(own)
        parts.append(np.concatenate([np.tile(own, count // len(own)), order[: count % len(own)]]))
    return np.concatenate(parts)
