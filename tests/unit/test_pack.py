"""Packing: few sequences, nothing lost, no label across a border."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fsdp_qlora.data.labels import IGNORE
from fsdp_qlora.data.pack import best_fit_decreasing, pack


def test_every_item_once_and_no_bin_too_full():
    lengths = np.random.default_rng(0).integers(1, 512, 2000)
    bins = best_fit_decreasing(lengths, 512)
    assert sorted(item for b in bins for item in b) == list(range(2000))
    assert max(int(lengths[b].sum()) for b in bins) <= 512
    assert bins == best_fit_decreasing(lengths, 512)


def test_best_fit_takes_the_fullest_bin_with_room():
    assert best_fit_decreasing([6, 5, 4, 4, 1], 10) == [[0, 2], [1, 3, 4]]
    assert best_fit_decreasing([], 8) == []
    with pytest.raises(ValueError, match="item 1 has length 9"):
        best_fit_decreasing([1, 9], 8)


def test_a_long_tail_is_packed_to_98_percent():
    lengths = np.minimum(2048, np.random.default_rng(1).lognormal(5.0, 1.0, 20_000).astype(int) + 8)
    bins = best_fit_decreasing(lengths, 2048)
    assert lengths.sum() / (len(bins) * 2048) >= 0.98


def test_positions_start_anew_and_first_tokens_are_not_learned():
    first = torch.tensor([5, 6, 7]), torch.tensor([True, True, True])
    second = torch.tensor([8, 9]), torch.tensor([False, True])
    batch = pack([[first, second], [second]], number=3, rows=(0, 1, 1))
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9], [8, 9, 0, 0, 0]]
    assert batch.labels.tolist() == [[IGNORE, 6, 7, IGNORE, 9], [IGNORE, 9, IGNORE, IGNORE, IGNORE]]
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert (batch.number, batch.rows) == (3, (0, 1, 1))
