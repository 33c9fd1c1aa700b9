"""Packed and unpacked are the same training: losses, gradients, and nothing of a neighbour in a row's logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from fsdp_qlora.adapters.names import trainable_parameters
from fsdp_qlora.attention.layout import Layout
from fsdp_qlora.checks.isolation import try_isolation
from fsdp_qlora.data.loader import TokenRows
from fsdp_qlora.data.pack import PackedRows, pack
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.errors import ModelError
from fsdp_qlora.model.root import CausalModel
from fsdp_qlora.objectives import build_objective, token_losses
from fsdp_qlora.parallel.shard import synchronize_gradients
from tests.build import build, losses, metrics, run_fit, whole
from tests.tiers import some_in_full
from tests.tolerances import FP32_LOSSES, close

BACKENDS = ("eager", "sdpa")


def _prepared(ranks: Ranks, model: str, rows: str, attention: str, **groups):
    return build(
        ranks, model, model={"name": model, "attn_implementation": attention},
        precision={"name": "fp32"}, data={"train": rows, "max_length": 160}, **groups,
    )  # fmt: skip


def _wake(model: CausalModel) -> None:
    """Give lora_B values, so that lora_A has gradients too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, p in trainable_parameters(model):
            local = p.to_local() if hasattr(p, "to_local") else p  # type: ignore[operator]
            local.add_(torch.randn(local.shape, generator=generator) * 0.02)


def _gradients(ranks: Ranks, model: str, rows: str, attention: str) -> list[float]:
    """Return the losses of packed and unpacked rows, and the relative distance of their gradients."""
    prepared = _prepared(ranks, model, rows, attention)
    _wake(prepared.model)
    objective, tokens = build_objective("sft"), TokenRows(prepared.data.train)
    packed = PackedRows(tokens, 160)
    assert len(packed) < len(tokens) / 2
    sums, grads = [], []
    for source in (packed, tokens):
        total = 0.0
        synchronize_gradients(prepared.model, True)
        for number in range(len(source)):
            loss, _ = objective.sums(prepared.model, source.collate([number], number).to(ranks.device))["loss"]
            loss.backward()
            total += float(loss)
        sums.append(total)
        grads.append([whole(p.grad).clone() for _, p in trainable_parameters(prepared.model)])
        for _, p in trainable_parameters(prepared.model):
            p.grad = None
    gap = torch.stack([(a - b).norm() for a, b in zip(*grads, strict=True)]).norm()
    return [*sums, float(gap / torch.stack([b.norm() for b in grads[1]]).norm())]


@pytest.mark.parametrize("attention", BACKENDS)
@pytest.mark.parametrize("num_ranks", some_in_full([1, 2], [2]))
def test_packed_losses_and_gradients_are_the_unpacked_ones(pool, tiny_model, chat_rows, attention, num_ranks):
    packed, alone, gap = pool.run(num_ranks, _gradients, str(tiny_model), str(chat_rows), attention)[0]
    assert abs(packed - alone) < FP32_LOSSES * alone
    assert gap < 1e-5


def _in_micro_batches(ranks: Ranks, model: str, rows: str, attention: str, sequences: int) -> float:
    """Return how far losses and gradients of micro-batches of packed rows are from those of each row alone, at most."""
    prepared = _prepared(
        ranks, model, rows, attention, train={"micro_batch_size": sequences, "global_batch_size": 2 * sequences}
    )
    _wake(prepared.model)
    packing = replace(prepared.config.data, packing=True)
    tokens = TokenRows(prepared.data.train)
    packed = Layout.of(packing, prepared.config.train, attention)(tokens)
    parts = [list(range(start, min(start + sequences, len(packed)))) for start in range(0, len(packed), sequences)]
    sums, grads = [], []
    for source, chosen in ((packed, parts), (tokens, [[row] for row in range(len(tokens))])):
        synchronize_gradients(prepared.model, True)
        found = [token_losses(prepared.model, source.collate(part, 0).to(ranks.device)) for part in chosen]
        sums.append(float(sum(x.sum() for x in found)))
        for x in found:
            x.sum().backward()
        grads.append([whole(p.grad).clone() for _, p in trainable_parameters(prepared.model)])
        for _, p in trainable_parameters(prepared.model):
            p.grad = None
    gap = torch.stack([(a - b).norm() for a, b in zip(*grads, strict=True)]).norm()
    return max(abs(sums[0] - sums[1]) / sums[1], float(gap / torch.stack([b.norm() for b in grads[1]]).norm()))


@pytest.mark.parametrize("sequences", [1, 2, 3])
def test_rows_in_micro_batches_of_packed_sequences_are_trained_as_alone(pool, tiny_model, chat_rows, sequences):
    """With varlen attention, in the place of flash attention's: one flat row without a mask."""
    for gap in pool.run(2, _in_micro_batches, str(tiny_model), str(chat_rows), "varlen", sequences):
        assert gap < 1e-5


def _other_neighbours(ranks: Ranks, model: str, rows: str, attention: str) -> bool:
    """Whether the logits of a row stay the same bit for bit when its neighbours, before and after it, are others."""
    prepared = _prepared(ranks, model, rows, attention)
    _wake(prepared.model)
    prepared.model.eval()
    generator = torch.Generator().manual_seed(2)
    learned = torch.ones(20, dtype=torch.bool)
    draw = lambda: (torch.randint(0, 300, (20,), generator=generator), learned)  # noqa: E731
    own, seen = draw(), []
    for _ in range(2):
        batch = pack([[draw(), own, draw()]])
        with torch.no_grad():
            seen.append(prepared.model.logits(batch.input_ids, batch.position_ids)[:, 20:40])
    return torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("attention", BACKENDS)
def test_other_neighbours_change_nothing_to_the_bit(pool, tiny_model, chat_rows, attention):
    assert all(pool.run(2, _other_neighbours, str(tiny_model), str(chat_rows), attention))


class _Deaf:
    """A model that does not hear of positions, as with a backend that ignores them."""

    def __init__(self, model: CausalModel) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, input_ids, labels, position_ids=None, *_, **__):
        return self.model(input_ids, labels)

    def logits(self, input_ids, position_ids=None):
        return self.model.logits(input_ids)


def _probe(ranks: Ranks, model: str, rows: str, attention: str) -> list:
    prepared = _prepared(ranks, model, rows, attention)
    layout = Layout.of(replace(prepared.config.data, packing=True), prepared.config.train, attention)
    try_isolation(prepared.model, layout, ranks)
    untouched = prepared.model.training and all(p.grad is None for _, p in trainable_parameters(prepared.model))
    try:
        try_isolation(cast(CausalModel, _Deaf(prepared.model)), layout, ranks)
    except ModelError as error:
        return [untouched, str(error)]
    return [untouched, "passed"]


@pytest.mark.parametrize("attention", BACKENDS)
def test_the_probe_refuses_what_mixes_rows(pool, tiny_model, chat_rows, attention):
    for untouched, said in pool.run(1, _probe, str(tiny_model), str(chat_rows), attention):
        assert untouched and "packed rows of this model leak into each other" in said and attention in said
        assert attention not in said.partition("try another")[2], "it is not the way out"


@pytest.mark.parametrize("num_ranks", some_in_full([1, 2, 3], [2]))
def test_packed_training_is_the_same_on_any_number_of_ranks(pool, tiny_model, chat_rows, tmp_path, num_ranks):
    groups = {
        "data": {"train": str(chat_rows), "packing": True, "eval_fraction": 0.1, "max_length": 96},
        "train": {"max_steps": 4, "global_batch_size": 5, "micro_batch_size": 1},
        "precision": {"name": "fp32"},
    }
    pool.run(num_ranks, run_fit, str(tiny_model), str(tmp_path), f"on{num_ranks}", dict(groups))
    pool.run(1, run_fit, str(tiny_model), str(tmp_path), "one", dict(groups))
    found, one = (metrics(tmp_path / name) for name in (f"on{num_ranks}", "one"))
    assert [m["tokens"] for m in found if "loss" in m] == [m["tokens"] for m in one if "loss" in m]
    assert close(losses(found), losses(one), FP32_LOSSES)
