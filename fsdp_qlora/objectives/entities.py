"""Entities in labels of words, and their F1, as conlleval and the package seqeval count them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Entity = tuple[str, int, int]
"""Its type, its first word, and the word after its last."""
_BEGINS, _ENDS = "BSU", "ESL"
"""Prefixes of an entity's first and last word, in IOB2, IOBES and BILOU."""
_PREFIXES = {*_BEGINS, *_ENDS, "I"}


def names_entities(names: Iterable[str]) -> bool:
    """Whether labels are ``O`` and types with a prefix (``B-PER``), so that words together make entities."""
    marked = [name for name in names if name != "O"]
    return bool(marked) and all(name[:1] in _PREFIXES and name[1:2] == "-" for name in marked)


def entities(labels: Sequence[str]) -> set[Entity]:
    """Return the entities of a text.

    As in conlleval, a word goes on with the entity before it if it has the same type and neither begins one nor follows
    the end of one; so an entity may begin with ``I-``.
    """
    made, kind, start, ended = set[Entity](), "", 0, True
    for at, label in enumerate([*labels, "O"]):
        prefix, _, own = label.partition("-")
        goes_on = prefix != "O" and not ended and own == kind and prefix not in _BEGINS
        if not goes_on:
            if kind:
                made.add((kind, start, at))
            kind, start = own if prefix != "O" else "", at
        ended = prefix == "O" or prefix in _ENDS
    return made


def of_entities(predicted: Sequence[Sequence[str]], wanted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return precision, recall and F1 of entities over all texts (micro-averaged): type and both ends must be right."""
    pairs = [(entities(ours), entities(theirs)) for ours, theirs in zip(predicted, wanted, strict=True)]
    right = sum(len(ours & theirs) for ours, theirs in pairs)
    ours, theirs = sum(len(pair[0]) for pair in pairs), sum(len(pair[1]) for pair in pairs)
    precision, recall = right / ours if ours else 0.0, right / theirs if theirs else 0.0
    return {
        "precision": precision, "recall": recall, "f1": 2 * right / (ours + theirs) if ours + theirs else 0.0
    }  # fmt: skip
