"""What the method promises, and what the studies measured of it: lines for README.md, drawn from results.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.studies.compare import Gap, difference, mean
from benchmarks.studies.questions import STUDIES, units_of

Results = Mapping[str, Mapping[str, Any]]
MARGIN = 0.02
"""Share of a loss that another may be above it and still be near it."""


@dataclass(frozen=True)
class Claim:
    """A promise, and the two variants of a study that it compares."""

    promise: str
    study: str
    variant: str
    reference: str
    rows: str = "held_out"
    near: bool = False
    """Whether the first may lose `MARGIN`; otherwise its loss has to be lower."""


HEAD = ("| promise | base | loss, difference to the other side | |", "| --- | --- | --- | --- |")
CLAIMS = (
    Claim("NF4 is near 16 bits", "formats", "nf4", "none", near=True),
    Claim("NF4 is near 16 bits", "encoder_formats", "nf4", "none", near=True),
    Claim("NF4 is better than FP4", "formats", "nf4", "fp4"),
    Claim("NF4 is better than FP4", "encoder_formats", "nf4", "fp4"),
    Claim("QLoRA is near LoRA", "methods", "QLoRA", "LoRA", near=True),
    Claim("QLoRA is near LoRA", "encoder_methods", "QLoRA", "LoRA", near=True),
    Claim("LoRA learns as much as full fine-tuning", "methods", "LoRA", "full, 1e-4", near=True),
    Claim("LoRA learns as much as full fine-tuning", "encoder_methods", "LoRA", "full, 1e-4", near=True),
    Claim("LoRA forgets less than full fine-tuning", "methods", "LoRA", "full, 1e-4", "unrelated"),
    Claim("LoRA forgets less than full fine-tuning", "encoder_methods", "LoRA", "full, 1e-4", "unrelated"),
    Claim("LoRA is better out of domain", "methods", "LoRA", "full, 1e-4", "elsewhere"),
    Claim("LoRA is better out of domain", "encoder_methods", "LoRA", "full, 1e-4", "elsewhere"),
    Claim("QLoRA is better on 50 rows than full fine-tuning", "rows", "QLoRA, 50 rows, 24 steps",
          "full, 50 rows, 24 steps"),
)  # fmt: skip


def word(claim: Claim, gap: Gap, loss: float) -> str:
    """Return whether a promise holds.

    Args:
        claim: the promise.
        gap: the difference of losses with its 95 % interval.
        loss: that of the reference.
    """
    _, low, high = gap
    margin = MARGIN * loss if claim.near else 0.0
    return "holds" if high < margin else "does not hold" if low > margin else "not shown"


def promises(results: Results) -> Iterator[str]:
    """Yield the rows of README's table, one for each promise of which both sides were measured."""
    studies = {study.name: study for study in STUDIES}
    for claim in CLAIMS:
        study = studies[claim.study]
        sides = zip(units_of(study, claim.variant), units_of(study, claim.reference), strict=True)
        both = [(a.name, b.name) for a, b in sides if a.name in results and b.name in results]
        if not both:
            continue
        above, below = ([results[name]["after"][claim.rows] for name in names] for names in zip(*both, strict=True))
        gap, loss = difference(above, below), sum(mean(rows) for rows in below) / len(both)
        measured = f"{gap[0]:+.4f} ({gap[1]:+.4f} to {gap[2]:+.4f}) to {loss:.3f}"
        yield f"| {claim.promise} | {study.base.split(' (')[0]} | {measured} | {word(claim, gap, loss)} |"
