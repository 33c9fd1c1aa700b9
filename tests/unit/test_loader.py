"""Each row once an epoch, in an order that knows no ranks."""

from __future__ import annotations

import pytest
from datasets import Dataset

from fsdp_qlora.data.deal import BatchPlan, deal, num_steps
from fsdp_qlora.data.loader import IGNORE, Cut, Loader, TokenRows, build_batch


@pytest.fixture(scope="module")
def rows():
    lengths = [3 + (n * 7) % 11 for n in range(24)]
    data = [{"input_ids": [n] * k, "learned": [False] + [True] * (k - 1), "source": 0} for n, k in enumerate(lengths)]
    return TokenRows(Dataset.from_list(data))


def _seen(rows, num_ranks, start, count, size=5):
    found = []
    for position in range(start, start + count, size):
        step = []
        for rank in range(num_ranks):
            batch = Loader(rows, size, Cut(2, rank, num_ranks), 0).batch_at(position, start + count)
            step += [int(r[0]) for m in batch.micro_batches if m.weight for r in m.input_ids]
        found.append(sorted(step))
    return found


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_each_row_once_an_epoch_and_the_same_batches_on_any_world(rows, num_ranks):
    steps = _seen(rows, num_ranks, 0, 48)
    assert steps == _seen(rows, 1, 0, 48)
    flat = Loader(rows, 5, Cut(2, 0, 1), 0).indices(0, 48)
    assert sorted(flat[:24]) == sorted(flat[24:]) == list(range(24))
    assert flat[:24] != flat[24:]


@pytest.mark.parametrize("position", [0, 1, 17, 24, 30])
def test_a_resume_at_any_position_goes_on_where_it_was(rows, position):
    loader = Loader(rows, 5, Cut(2, 0, 1), 3)
    assert loader.indices(0, 60)[position:] == loader.indices(position, 60 - position)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_every_rank_runs_as_many_micro_batches_and_the_totals_are_global(rows, num_ranks):
    batches = [build_batch(rows, list(range(7)), Cut(2, rank, num_ranks)) for rank in range(num_ranks)]
    assert len({len(b.micro_batches) for b in batches}) == 1
    assert {b.weights["tokens"] for b in batches} == {int(rows.targets[:7].sum())}
    own = sum(int((m.labels[:, 1:] != IGNORE).sum()) for b in batches for m in b.micro_batches if m.weight)
    assert own == batches[0].weights["tokens"]
    numbers = sorted(m.number for b in batches for m in b.micro_batches if m.weight)
    assert numbers == [0, 1, 2, 3]


def test_dealing():
    assert deal(5, 0, 2) == [0, 2, 4]
    assert deal(5, 1, 2) == [1, 3, None]
    assert deal(1, 2, 3) == [None]
    plan = BatchPlan(7, 2, 3)
    assert (plan.num_micro_batches, plan.accumulation_steps) == (4, 2)
    assert num_steps(0, 2.0, 10, 8) == 3
    assert num_steps(5, 2.0, 10, 8) == 5
