"""Scores of texts are those of a whole softmax, and what does not fit loses the beginning of its context."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fsdp_qlora.inference.scores import cut_pair, score_batch

VOCAB = 11


class Table:
    """Logits that depend on the token and its position."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.asked: list[tuple[int, ...]] = []
        self.weights = torch.randn(600, VOCAB, VOCAB, generator=torch.Generator().manual_seed(0))

    def logits(self, ids: torch.Tensor, last: int) -> torch.Tensor:
        self.asked.append((*ids.shape, last))
        return torch.stack([self.weights[torch.arange(ids.shape[1]), row] for row in ids])[:, -last:]


def formula(table: Table, context: list[int], text: list[int]) -> tuple[float, bool]:
    """Return the log-probability of a text and whether it is greedy, a token at a time."""
    total, greedy, read = 0.0, True, list(context)
    for token in text:
        logits = table.weights[len(read) - 1, read[-1]].double()
        total += (logits - logits.exp().sum().log())[token].item()
        greedy = greedy and int(logits.argmax()) == token
        read.append(token)
    return total, greedy


def test_scores_are_those_of_the_formula():
    table: Any = Table()
    greedy = [4, int(table.weights[0, 4].argmax())]
    pairs = [([1, 2, 3], [4, 5]), (greedy[:1], greedy[1:]), ([7], [1, 2, 3, 4, 5, 6]), ([1] * 300, [2, 3] * 140)]
    for chosen in (pairs, pairs[:2], pairs[1:2]):
        scores = score_batch(table, chosen)
        for score, pair in zip(scores, chosen, strict=True):
            assert score == (pytest.approx(formula(table, *pair)[0], rel=1e-5), formula(table, *pair)[1])
    assert [score[1] for score in score_batch(table, pairs)] == [False, True, False, False]
    assert table.asked[1] == (2, 4, 4)  # from the first scored position on


@pytest.mark.parametrize(("context", "text", "kept"), [(9, 1, 9), (10, 1, 10), (12, 1, 10), (5, 8, 3), (5, 10, 1)])
def test_a_long_context_loses_its_beginning(context, text, kept):
    """As HFLM: the last positions + 1 tokens of both, of which the last one is not read."""
    cut, same = cut_pair((list(range(context)), [0] * text), 10)
    assert cut == list(range(context))[-kept:] and len(same) == text and len(cut) + text - 1 <= 10
    whole = (list(range(context)) + [0] * text)[-11:]
    assert cut + same == whole
