"""All pairs: a few walks in which each value of a setting meets each value of every other setting at least once.

Two settings that do not suit each other are what goes wrong most often. A greedy choice (after D. M. Cohen et al., "The
AETG system", 1997) is enough: the largest two settings alone need 40 walks.
"""

from __future__ import annotations

import random
from functools import cache
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fsdp_qlora.config.choices import OPTIMIZERS
from fsdp_qlora.config.rules import check
from fsdp_qlora.errors import ConfigError
from fsdp_qlora.model.skeleton import read_shapes
from fsdp_qlora.plan.plan import make_plan
from fsdp_qlora.run.decide import planned_skeleton
from fsdp_qlora.shapes.linears import ModelShapes
from tests.fake_cuda.variant import Variant, config_of, make_folder

ALL_PAIRS = "all pairs"
"""The name under which all these walks are asked for."""
Settings = dict[str, dict[str, Any]]
WALK = "walk"
"""The group of what is no setting of a run but a field of `Variant`."""
ON_HOST = ["head", "embeddings", "norms"]
FACTORS: dict[str, dict[str, Settings]] = {
    "optim": {name: {"optim": {"name": name}} for name in OPTIMIZERS},
    "quant": {
        "nf4": {},
        "nf4 once": {"quant": {"double_quant": False}},
        "fp4": {"quant": {"name": "fp4"}},
        "int8": {"quant": {"name": "int8", "double_quant": False}},
        "16 bit": {"quant": {"name": "none"}},
    },
    "offload": {
        "on the device": {},
        **{f"offload {kind}": {"fsdp": {"offload": kind}} for kind in ("params", "activations", "all")},
        "modules on the host": {"fsdp": {"offload_modules": ON_HOST}},
    },
    "ranks": {
        "2 ranks": {},
        "1 rank": {WALK: {"world_size": 1}},
        "2 x 2 ranks": {WALK: {"world_size": 4}, "fsdp": {"replicate_degree": 2}},
        "2 copies": {"fsdp": {"replicate_degree": 2}},
    },
    "attention": {name: {"model": {"attn_implementation": name}} for name in ("sdpa", "eager", "varlen")},
    "checkpointing": {
        "kept": {},
        **{kind: {"train": {"activation_checkpointing": kind}} for kind in ("selective", "full")},
    },
    "rows": {"single": {"data": {"packing": False}}, "packed": {"data": {"packing": True}}},
    "adapters": {"sharded": {}, "replicated": {"fsdp": {"adapters": "replicated"}}},
    "kernels": {"torch": {}, "fused": {"train": {"kernels": "compile"}}},
    "compile": {"eager": {}, "compiled": {"train": {"compile": "true"}}},
    "micro-batches": {"1": {WALK: {"accumulation": 1}}, "2": {}},
}
"""Setting -> name of a value -> the groups that it sets. The first value is the default, which suits every other."""
Cell = tuple[int, int]
"""The number of a setting, and of one of its values."""
Pair = tuple[Cell, Cell]
_CANDIDATES = 4
"""Rows that are tried for each one that is taken."""


def variant_of(*parts: Settings) -> Variant:
    """Return the walk of these settings, with a batch as the product would lay it out for them."""
    groups: Settings = {}
    for part in parts:
        for group, values in part.items():
            groups[group] = groups.get(group, {}) | values
    walk = groups.pop(WALK, {})
    packed = groups.get("data", {}).get("packing", False)
    varlen = groups.get("model", {}).get("attn_implementation") == "varlen"
    batch = "flat" if varlen else "packed" if packed else "padded"
    return Variant(settings=groups, batch=batch, **walk)


@cache
def _shapes() -> ModelShapes:
    with TemporaryDirectory() as folder:
        return read_shapes(planned_skeleton(config_of(make_folder(Path(folder), "llama"), Variant()))[1])


def refused(*parts: Settings) -> str:
    """Return why the product's rules or its plan refuse these settings together; empty if they do not."""
    variant = variant_of(*parts)
    config = config_of(Path("model"), variant)
    try:
        make_plan(check(config), _shapes(), variant.world_size)
    except ConfigError as error:
        return str(error)
    return ""


_VALUES = [list(values.items()) for values in FACTORS.values()]
_CELLS = [(factor, value) for factor, values in enumerate(_VALUES) for value in range(len(values))]


def _suit(a: Cell, b: Cell) -> bool:
    alone = 0 in (a[1], b[1])  # a default changes nothing, so the other value is judged by itself
    return alone or not refused(*(_VALUES[factor][value][1] for factor, value in (a, b)))


@cache
def allowed_pairs() -> frozenset[Pair]:
    """Return the pairs of values of two settings that the product takes."""
    return frozenset((a, b) for a, b in combinations(_CELLS, 2) if a[0] != b[0] and _suit(a, b))


def _row(first: Pair, missing: set[Pair], order: list[int]) -> list[Cell]:
    """Return a row with the pair ``first``; the other settings, in this order, take what meets most that is missing."""
    row, allowed = list(first), allowed_pairs()
    for factor in order:
        if factor not in (first[0][0], first[1][0]):
            meets = {cell: {_pair(cell, other) for other in row} for cell in _CELLS if cell[0] == factor}
            fitting = [cell for cell, pairs in meets.items() if pairs <= allowed]
            row.append(max(fitting, key=lambda cell: len(meets[cell] & missing)))
    return sorted(row)


def _pair(a: Cell, b: Cell) -> Pair:
    return (a, b) if a < b else (b, a)


@cache
def all_pairs() -> dict[str, Variant]:
    """Return the walks by name; the same ones every time."""
    chance, missing, walks = random.Random(0), set(allowed_pairs()), {}
    order = list(range(len(_VALUES)))
    while missing:
        first = min(missing)
        rows = [_row(first, missing, chance.sample(order, len(order))) for _ in range(_CANDIDATES)]
        row = max(rows, key=lambda row: len(missing.intersection(combinations(row, 2))))
        missing.difference_update(combinations(row, 2))
        names, parts = zip(*(_VALUES[factor][value] for factor, value in row), strict=True)
        walks[", ".join(names)] = variant_of(*parts, {WALK: {"steps": (1, 2), "backend": "eager"}})
    return walks
