"""Training from a checkpoint that is 4-bit already: the numbers of quantizing it ourselves, for fewer bytes read."""

from __future__ import annotations

import pytest
import torch

from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.shards import local_tensor
from fsdp_qlora.errors import FsdpQloraError
from fsdp_qlora.quant.linear import QuantLinear
from fsdp_qlora.quant.matrices import STATISTICS
from fsdp_qlora.quant.packing import raw_bytes
from tests import tiny
from tests.build import build, losses, run_fit
from tests.tiers import some_in_full

FORMATS = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)]


def _parts(ranks: Ranks, folder: str, quant: dict) -> tuple[dict[str, torch.Tensor], int]:
    prepared = build(ranks, folder, quant=quant)
    found = {}
    for name, module in prepared.model.base.named_modules():
        if isinstance(module, QuantLinear):
            for part in ("packed", *STATISTICS, "offset"):
                if (value := getattr(module, part)) is not None:
                    found[f"{name}.{part}"] = raw_bytes(local_tensor(value))
    return found, prepared.load.stored


def _differences(ranks: Ranks, plain: str, packed: str, quant: dict) -> tuple[list[str], int]:
    (ours, none), (theirs, stored) = _parts(ranks, plain, quant), _parts(ranks, packed, quant)
    assert none == 0 and ours.keys() == theirs.keys()
    return [name for name, value in ours.items() if not torch.equal(value, theirs[name])], stored


def _cases(ranks: int):
    """Every format on ``ranks`` ranks, on other numbers in the whole matrix."""
    others = [n for n in (1, 2, 3) if n != ranks]
    every = [(n, *each) for n in (ranks, *others) for each in FORMATS]
    return some_in_full(every, [(ranks, "nf4", True), (ranks, "fp4", False)])


@pytest.mark.parametrize(("num_ranks", "name", "double_quant"), _cases(3))
def test_every_rank_holds_the_bytes_it_would_have_quantized(pool, tiny_model, tmp_path, num_ranks, name, double_quant):
    packed = tiny.make_packed(tiny_model, tmp_path / "packed", name, double_quant)
    quant = {"name": name, "double_quant": double_quant}
    assert pool.run(num_ranks, _differences, str(tiny_model), str(packed), quant) == [([], 14)] * num_ranks


@pytest.mark.parametrize(("num_ranks", "name", "double_quant"), _cases(2))
def test_losses_equal_quantizing_the_same_weights(pool, tiny_model, chat_rows, tmp_path, num_ranks, name, double_quant):
    packed = tiny.make_packed(tiny_model, tmp_path / "packed", name, double_quant)
    groups = {
        "data": {"train": str(chat_rows), "max_length": 64},
        "quant": {"name": name, "double_quant": double_quant},
    }
    runs = [
        pool.run(num_ranks, run_fit, str(folder), str(tmp_path), label, {**groups})[0]
        for label, folder in (("plain", tiny_model), ("packed", packed))
    ]
    plain, stored = (losses(run["metrics"]) for run in runs)
    assert len(plain) == 4 and plain == stored
    assert [m["grad_norm"] for m in runs[0]["metrics"]] == [m["grad_norm"] for m in runs[1]["metrics"]]


def _bytes_read(ranks: Ranks, folder: str) -> int:
    return build(ranks, folder).load.bytes_read


def test_each_rank_reads_its_share_of_a_stored_base(pool, tmp_path):
    plain = tiny.make_model(tmp_path / "wide", hidden_size=512, intermediate_size=2048)
    packed = tiny.make_packed(plain, tmp_path / "packed")
    whole = (packed / "model.safetensors").stat().st_size
    read = pool.run(3, _bytes_read, str(packed))
    assert all(0.3 * whole < count < 0.37 * whole for count in read)  # each also the header and the maps
    assert all(a < 0.35 * b for a, b in zip(read, pool.run(3, _bytes_read, str(plain)), strict=True))


def test_what_was_left_in_16_bit_is_quantized_as_usual(pool, tiny_model, tmp_path):
    skipped = ["q_proj", "down_proj", "lm_head"]
    packed = tiny.make_packed(tiny_model, tmp_path / "packed", llm_int8_skip_modules=skipped)
    assert pool.run(2, _differences, str(tiny_model), str(packed), {}) == [([], 10)] * 2


def _refused(ranks: Ranks, folder: str) -> str:
    try:
        build(ranks, folder)
    except FsdpQloraError as error:
        return str(error)
    return ""


def test_another_format_is_refused_on_every_rank(pool, tiny_model, tmp_path):
    packed = tiny.make_packed(tiny_model, tmp_path / "packed", "fp4", False)
    said = pool.run(2, _refused, str(packed))
    assert all("set quant=fp4 quant.double_quant=false" in text for text in said)
