"""Blockwise attention equals eager attention, masks and shared key heads included; what it cannot do is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING
from transformers.integrations.sdpa_attention import repeat_kv

from fsdp_qlora.attention import blockwise as attention
from fsdp_qlora.attention.blockwise import blockwise_forward, ops
from fsdp_qlora.attention.candidates import attention_candidates
from fsdp_qlora.errors import ModelError
from tests.unit.test_norms import Ops

CASES = {
    "short, as many key heads": (2, 4, 4, 7, 16),
    "several blocks": (1, 6, 2, 300, 16),
    "a whole number of blocks": (2, 2, 1, 256, 8),
}


def _inputs(rows, heads, key_heads, length, size, dtype):
    generator = torch.Generator().manual_seed(length)
    shapes = ((rows, heads, length, size), (rows, key_heads, length, size), (rows, key_heads, length, 2 * size))
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def _eager(query, key, value, mask):
    groups = query.shape[1] // key.shape[1]
    scores = (query * query.shape[-1] ** -0.5) @ repeat_kv(key, groups).transpose(2, 3)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return (torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype) @ repeat_kv(value, groups)).transpose(1, 2)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_eager_attention(monkeypatch, case, masked, keep, dtype):
    if not keep:
        monkeypatch.setattr(attention, "KEPT_SCORES_LENGTH", 0)
    query, key, value = _inputs(*CASES[case], dtype)
    length = query.shape[2]
    places = torch.arange(length)
    mask = places[:, None] >= places
    if masked:  # packed rows of 70 tokens
        mask = mask & (places[:, None] // 70 == places // 70)
    given = mask[None, None].expand(query.shape[0], 1, length, length) if masked else None
    found = []
    grad = torch.randn(query.shape[0], length, query.shape[1], value.shape[-1]).to(dtype)
    for attend in (
        lambda: blockwise_forward(SimpleNamespace(), query, key, value, given)[0], lambda: _eager(query, key, value, mask),
    ):  # fmt: skip
        out = attend()
        found.append([out, *torch.autograd.grad(out, (query, key, value), grad)])
    limit = 2e-6 if dtype == torch.float32 else 1e-2
    for ours, theirs in zip(*found, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        assert (ours - theirs).float().norm() <= limit * theirs.float().norm()


@pytest.mark.parametrize("decoding", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_one_query_sees_all_keys(decoding, masked):
    query, key, value = _inputs(2, 4, 2, 9, 16, torch.float32)
    query, mask = query[:, :, -1:], torch.ones(2, 1, 1, 9, dtype=torch.bool)
    if masked:  # padded on the left
        mask[1, ..., :4] = False
    with torch.set_grad_enabled(not decoding):
        out = blockwise_forward(SimpleNamespace(), query, key, value, mask if masked else None)[0]
    torch.testing.assert_close(out, _eager(query, key, value, mask))


def test_one_query_reads_the_keys_once_for_all_heads_that_share_them():
    """What sdpa does with shared heads: a head of its own for each query head, 3 times the products here."""
    query, key, value = (t.detach() for t in _inputs(2, 6, 2, 33, 16, torch.bfloat16))
    with torch.no_grad(), FlopCounterMode(display=False) as flops, Ops() as ran:
        blockwise_forward(SimpleNamespace(), query[:, :, -1:], key, value, None)
    assert {name for name in ran.counts if "mm" in name or "attention" in name} == {"aten::bmm"}
    assert not {"aten::clone", "aten::copy_", "aten::repeat"} & ran.counts.keys(), "neither keys nor values are copied"
    assert flops.get_total_flops() == 2 * 2 * 6 * 33 * (16 + 32)


@pytest.mark.parametrize("asked", [{"softcap": 50.0}, {"s_aux": torch.ones(4)}, {"dropout": 0.1}])
def test_what_it_has_not_is_refused(asked):
    with pytest.raises(ModelError, match=r"model\.attn_implementation: blockwise does not support"):
        blockwise_forward(SimpleNamespace(), *_inputs(1, 4, 4, 8, 8, torch.float32), None, **asked)


def test_shapes_on_fake_tensors_are_the_real_ones():
    query, key, value = (t.detach() for t in _inputs(2, 4, 2, 140, 8, torch.float32))
    for keep in (True, False):
        out, kept = ops.attention(query, key, value, None, 0.3, True, keep)
        torch.library.opcheck(ops.attention.default, (query, key, value, None, 0.3, True, keep))
        rest = (torch.randn_like(out), query, key, value, out, None, kept if keep else None, 0.3, True)
        torch.library.opcheck(ops.attention_backward.default, rest)


@pytest.mark.parametrize(("model_type", "first"), [("bert", "sdpa"), ("xlm", "eager"), ("deberta", "eager")])
def test_encoders_are_planned_with_attention_that_their_class_has(model_type, first):
    gpu, config = torch.device("cuda"), CONFIG_MAPPING[model_type]()
    for auto_class in ("AutoModel", "AutoModelForMaskedLM", "AutoModelForSequenceClassification"):
        candidates = attention_candidates(gpu, None, config, torch.bfloat16, auto_class=auto_class)
        assert candidates[0] == first and candidates[-1] == "eager"
