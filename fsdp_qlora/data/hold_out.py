"""Chooses the rows that are held out for evaluation, by prompt; ``auto`` leaves near-copies of training rows in.

A near-copy of a training row says nothing about rows that were never trained on: its loss falls as that row's does.
Two sequences count as near-copies if they share at least `_ALIKE` of their runs of `_RUN` tokens (Jaccard), apart from
runs that most sequences have, such as a chat template's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

SHARE, LEAST, MOST = 0.05, 4, 200
"""Share of the sequences that ``auto`` holds out, and the fewest and the most of them."""
LEAST_ROWS = 20
"""Of fewer sequences, ``auto`` holds out none."""
_RUN, _ALIKE, _COMMON = 2, 0.6, 0.5
"""Tokens in a run; the share of runs that makes two sequences near-copies (one token of ten may differ, 7 of 11 runs);
the share of sequences from which on a run counts as common to all."""
_LOOKED_AT = (4, 64)
"""Sequences looked at, as multiples of those wanted: more of them where too few of the first stand alone."""


@dataclass(frozen=True)
class HeldOut:
    """What ``auto`` holds out."""

    keys: frozenset[int]
    """Hashes of the prompts."""
    why: str


def in_order(keys: Sequence[int] | set[int], seed: int) -> list[int]:
    """Return prompts in the order in which they are held out, which depends only on the prompts and the seed."""
    return sorted(keys, key=lambda key: hashlib.sha256(f"{seed}\0{key}".encode()).digest())


def choose_held_out(keys: Sequence[int], seed: int, tokens: Path) -> HeldOut:
    """Return the prompts that ``data.eval_fraction=auto`` holds out.

    Args:
        keys: for each sequence, the hash of its prompt.
        seed: the run's seed.
        tokens: the Arrow stream of the sequences, in the same order; its first column of lists of integers holds their
            tokens, and without one near-copies are not looked for.
    """
    total = len(keys)
    if total < LEAST_ROWS:
        return HeldOut(frozenset(), f"{total} rows are fewer than {LEAST_ROWS}")
    wanted = min(MOST, max(LEAST, round(SHARE * total)))
    distinct, counts = np.unique(np.array(keys, dtype=np.uint64), return_counts=True)
    size = dict(zip(distinct.tolist(), counts.tolist(), strict=True))
    chosen, copies = list[int](), set[int]()
    for factor in _LOOKED_AT:
        candidates = _first(in_order(set(size), seed), size, wanted, factor * wanted)
        copies = _with_near_copies(candidates, keys, tokens)
        chosen = _first([key for key in candidates if key not in copies], size, wanted, wanted)
        if sum(size[key] for key in chosen) >= wanted:
            break
    held_out = sum(size[key] for key in chosen)
    if held_out < LEAST:
        why = f"too few of {total} rows stand alone: others share their prompt or nearly equal them"
        return HeldOut(frozenset(), why)
    skipped = f", {len(copies)} near-copies of others passed over" if copies else ""
    return HeldOut(frozenset(chosen), f"{held_out} of {total} rows{skipped}")


def _first(ordered: list[int], size: dict[int, int], largest: int, total: int) -> list[int]:
    """Return the first prompts with at most ``total`` sequences together, without those of more than ``largest``."""
    taken, left = [], total
    for key in ordered:
        if size[key] <= min(largest, left):
            taken.append(key)
            left -= size[key]
        if not left:
            break
    return taken


def _with_near_copies(candidates: list[int], keys: Sequence[int], tokens: Path) -> set[int]:
    """Return the candidates that have a near-copy among the sequences with other prompts."""
    number = {key: index for index, key in enumerate(candidates)}
    of_candidates: list[tuple[np.ndarray, int]] = []  # runs of a sequence, and which candidate it belongs to
    for index, runs in _runs(tokens):
        if (candidate := number.get(keys[index])) is not None:
            of_candidates.append((runs, candidate))
    if not of_candidates:
        return set()
    known = np.unique(np.concatenate([runs for runs, _ in of_candidates]))
    common = _common(known, tokens, len(keys))
    owners: dict[int, list[int]] = {}
    sizes = []
    for sequence, (runs, _) in enumerate(of_candidates):
        own = runs[~np.isin(runs, common)]
        sizes.append(len(own))
        for run in own.tolist():
            owners.setdefault(run, []).append(sequence)
    rare = np.setdiff1d(known, common)
    near: set[int] = set()
    for index, runs in _runs(tokens):
        shared: dict[int, int] = {}
        for run in runs[np.isin(runs, rare)].tolist():
            for sequence in owners.get(run, ()):
                shared[sequence] = shared.get(sequence, 0) + 1
        length = len(runs) - int(np.isin(runs, common).sum()) if shared else 0
        for sequence, count in shared.items():
            candidate = of_candidates[sequence][1]
            if candidates[candidate] != keys[index] and count >= _ALIKE * (sizes[sequence] + length - count):
                near.add(candidates[candidate])
    return near


def _common(known: np.ndarray, tokens: Path, total: int) -> np.ndarray:
    """Return those of the ``known`` runs that at least half of all sequences have."""
    counts = np.zeros(len(known), dtype=np.int64)
    for _, runs in _runs(tokens):
        places = np.minimum(np.searchsorted(known, runs), len(known) - 1)
        counts[places[known[places] == runs]] += 1
    return known[counts >= _COMMON * total]


def _runs(tokens: Path) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each sequence's index and the hashes of its distinct runs of tokens, uint64 and sorted."""
    import pyarrow as pa

    index = 0
    with pa.memory_map(str(tokens)) as source, pa.ipc.open_stream(source) as stream:
        kinds = enumerate(stream.schema.types)
        place = next((i for i, kind in kinds if pa.types.is_list(kind) and pa.types.is_integer(kind.value_type)), None)
        for batch in stream if place is not None else ():  # rows of images have no tokens to compare
            column: pa.ListArray = batch.column(place)  # type: ignore[assignment]
            ends, ids = column.offsets.to_numpy(), column.values.to_numpy()
            for start, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
                yield index, _hashes(ids[start:end])
                index += 1


def _hashes(ids: np.ndarray) -> np.ndarray:
    """Return the hashes of the distinct runs, or of the whole sequence if it is shorter than one."""
    parts = ids.astype(np.uint64)
    count = max(1, len(parts) - _RUN + 1)
    mixed = np.zeros(count, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for offset in range(min(_RUN, len(parts))):  # FNV-1a's prime; 64 bits hold any two runs apart well enough
            mixed = (mixed ^ parts[offset : offset + count]) * np.uint64(1099511628211)
    return np.unique(mixed)
