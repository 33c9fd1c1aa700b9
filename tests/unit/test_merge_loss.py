"""``export.merge_base=auto``: the loss that decides, in memory and layer by layer from the disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fsdp_qlora.run.held_out import held_out_loss
from tests import upstream
from tests.matrix import small_config

LENGTHS = (5, 400, 37, 400, 400, 12)


@torch.no_grad()
def _plain_loss(base: Path, rows: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    losses = [
        model(ids[None], labels=ids.where(learned, -100)[None]).loss.double() * learned[1:].sum()
        for ids, learned in rows
    ]
    return float(sum(losses) / sum(learned[1:].sum() for _, learned in rows))


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt2"])
def test_rows_go_together_and_a_model_may_stay_on_disk(tmp_path, family):
    config = small_config(family)
    config.max_position_embeddings = max(LENGTHS)
    base = upstream.write_random(tmp_path / "base", config, torch.float32)
    ids = torch.Generator().manual_seed(0)
    rows = [(torch.randint(0, 90, (length,), generator=ids), torch.arange(length) % 3 > 0) for length in LENGTHS]
    wanted = _plain_loss(base, rows)
    for offload in (None, tmp_path / "offloaded"):
        assert held_out_loss(base, rows, torch.float32, offload) == pytest.approx(wanted, rel=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
