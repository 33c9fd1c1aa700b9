"""Log-probabilities of given texts. The ranks share them: each scores its own batches, and all run as many forwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fsdp_qlora.data.deal import deal
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.reduce import all_sum
from fsdp_qlora.model.root import CausalModel

Pair = tuple[list[int], list[int]]
"""Tokens of a context, at least one, and of the text after it that is scored, at least one."""
Score = tuple[float, bool]
"""The log-probability of a text after its context, in nat, and whether it is what greedy decoding would write."""
_SLICE = 256
"""Positions whose logits are in float32 at the same time."""


def cut_pair(pair: Pair, most: int) -> Pair:
    """Return a pair that fits into a model with ``most`` positions, without the beginning of its context.

    The last token is predicted and not read, so there is room for one more.
    """
    context, text = pair
    return context[-max(1, most + 1 - len(text)) :], text


@torch.no_grad()
def score_batch(model: CausalModel, pairs: Sequence[Pair]) -> list[Score]:
    """Score pairs in one forward; they are padded on the right, where causal attention does not look.

    Under FSDP every rank must call it, with pairs of its own.
    """
    width = max(len(context) + len(text) for context, text in pairs) - 1
    first = min(len(context) for context, _ in pairs) - 1  # the position that predicts the first scored token
    ids = torch.zeros(len(pairs), width, dtype=torch.long)
    for row, (context, text) in enumerate(pairs):
        ids[row, : len(context) + len(text) - 1] = torch.tensor((context + text)[:-1])
    logits = model.logits(ids.to(model.device), last=width - first)
    sums = [
        _score(logits[row, len(context) - 1 - first :][: len(text)], torch.tensor(text, device=logits.device))
        for row, (context, text) in enumerate(pairs)
    ]
    return [(value, bool(greedy)) for value, greedy in torch.stack(sums).tolist()]


def _score(logits: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of ``text`` int64 ``[tokens]`` and whether it is greedy, float64 ``[2]``.

    ``logits`` are ``[tokens, vocab]``.
    """
    total = torch.zeros(2, dtype=torch.float64, device=logits.device)
    total[1] = 1
    for start in range(0, len(text), _SLICE):
        part, ids = logits[start : start + _SLICE].float(), text[start : start + _SLICE]
        total[0] += part.log_softmax(-1).gather(-1, ids[:, None]).sum()
        total[1] *= (part.argmax(-1) == ids).all()
    return total


def score_all(
    model: CausalModel, pairs: Sequence[Pair], batch_size: int, ranks: Ranks,
    say: Callable[[int, int], None] | None = None,
) -> list[Score]:  # fmt: skip
    """Score all pairs; every rank calls it with the same ones and gets all scores.

    ``say`` is told after each batch how many of all pairs are done, roughly.

    Batches are dealt like micro-batches: where they do not divide, the last ranks run one of weight zero.
    """
    if not pairs:
        return []
    was_training = model.training
    model.eval()
    order = sorted(range(len(pairs)), key=lambda n: (-len(pairs[n][0]) - len(pairs[n][1]), n))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    scores = torch.zeros(len(pairs), 2, dtype=torch.float64)
    for turn, number in enumerate(deal(len(batches), ranks.rank, ranks.size), 1):
        rows = batches[-1][-1:] if number is None else batches[number]
        own = score_batch(model, [pairs[row] for row in rows])
        if number is not None:
            scores[rows] = torch.tensor(own, dtype=torch.float64)
        if say is not None:
            say(min(len(pairs), turn * ranks.size * batch_size), len(pairs))
    model.train(was_training)
    summed = torch.tensor(all_sum(scores.flatten(), ranks), dtype=torch.float64).view(-1, 2)
    return [(value, bool(greedy)) for value, greedy in summed.tolist()]
