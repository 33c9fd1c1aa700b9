"""Attention within sequences that lie end to end, in plain torch, is eager attention to each of them alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig
from transformers.integrations.sdpa_attention import repeat_kv

from fsdp_qlora.attention import candidates
from fsdp_qlora.attention.candidates import attention_candidates, why_not
from fsdp_qlora.attention.flatten import decoder_inputs, reads_boundaries
from fsdp_qlora.attention.varlen import ops, varlen_forward
from fsdp_qlora.config.convert import field_types, words_of
from fsdp_qlora.config.schema import ModelSettings
from fsdp_qlora.data.labels import IGNORE
from fsdp_qlora.data.loader import MicroBatch
from fsdp_qlora.data.pack import flat_batch, pack
from fsdp_qlora.errors import ModelError

ENDS = [0, 5, 5, 150, 151, 400, 400]
"""Boundaries: an empty sequence, one of a single token, some longer than a block of queries, the last one repeated."""


def _inputs(heads, key_heads, size, dtype=torch.float32, length=ENDS[-1]):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, length, size), (1, key_heads, length, size), (1, key_heads, length, size)]
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def _eager(query, key, value, ends, scale, window, softcap):
    """Return what eager attention gives with a dense mask."""
    places = torch.arange(query.shape[2])
    row = torch.bucketize(places, torch.tensor(ends[1:]), right=True)
    seen = (row[:, None] == row) & (places <= places[:, None])
    if window:
        seen = seen & (places > places[:, None] - window)
    group = query.shape[1] // key.shape[1]
    scores = query @ repeat_kv(key, group).transpose(2, 3) * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = scores.masked_fill(~seen, -torch.inf)
    return (torch.softmax(scores, -1) @ repeat_kv(value, group)).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 2, 7, 130])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (3, 1)])
def test_forward_and_gradients_are_those_of_eager_attention(window, softcap, heads, key_heads):
    found, wanted = _inputs(heads, key_heads, 16), _inputs(heads, key_heads, 16)
    boundaries = torch.tensor(ENDS, dtype=torch.int32)
    out = varlen_forward(
        SimpleNamespace(), *found, None, scaling=0.3, sliding_window=window, softcap=softcap,
        cu_seq_lens_q=boundaries, max_length_q=400,
    )[0]  # fmt: skip
    other = _eager(*wanted, ENDS, 0.3, window, softcap)
    torch.testing.assert_close(out, other, rtol=2e-5, atol=2e-6)
    slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(slope)
    other.backward(slope)
    for x, y in zip(found, wanted, strict=True):
        assert (x.grad - y.grad).norm() <= 2e-6 * y.grad.norm()


def test_in_16_bits_it_differs_by_their_rounding():
    found = _inputs(4, 2, 16, torch.bfloat16)
    exact = _eager(*(x.float() for x in found), ENDS, 0.25, None, None)
    out = varlen_forward(
        SimpleNamespace(), *found, None, scaling=0.25, cu_seq_lens_q=torch.tensor(ENDS, dtype=torch.int32),
        max_length_q=400,
    )[0]  # fmt: skip
    assert out.dtype == torch.bfloat16 and (out - exact).norm() < 1e-2 * exact.norm()


def test_without_boundaries_each_row_of_the_batch_is_a_sequence():
    query, key, value = (torch.cat([x, x.flip(2)]) for x in _inputs(4, 2, 16, length=20))
    out = varlen_forward(SimpleNamespace(), query, key, value, None, sliding_window=6)[0]
    for row in range(2):
        alone = [x[row : row + 1] for x in (query, key, value)]
        torch.testing.assert_close(out[row : row + 1], _eager(*alone, [0, 20], 0.25, 6, None), rtol=1e-5, atol=1e-6)


def test_the_last_queries_alone_see_what_they_see_among_all():
    """As in generation, with the keys before them in a cache."""
    query, key, value = _inputs(4, 2, 16, length=20)
    whole = varlen_forward(SimpleNamespace(), query, key, value, None, sliding_window=6, softcap=3.0)[0]
    for last in (1, 3):
        part = varlen_forward(
            SimpleNamespace(), query[:, :, -last:], key, value, None, sliding_window=6, softcap=3.0
        )[0]  # fmt: skip
        torch.testing.assert_close(part, whole[:, -last:], rtol=1e-5, atol=1e-6)


def test_torch_finds_nothing_wrong_with_the_ops():
    q, k, v = (x.detach()[0].transpose(0, 1) for x in _inputs(4, 2, 8, length=30))
    boundaries = torch.tensor([0, 12, 30], dtype=torch.int32)
    torch.library.opcheck(ops.varlen_attention.default, (q, k, v, boundaries, 0.3, 0, 0.0))
    arguments = (q, q, k, v, q, boundaries, 0.3, 5, 2.0)
    torch.library.opcheck(ops.varlen_attention_backward.default, arguments)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"s_aux": 1}, "not support s_aux"),
        ({"dropout": 0.1}, "not support attention dropout"),
        ({"is_causal": False}, "later tokens"),
    ],
)
def test_what_it_lacks_is_refused(asked, said):
    with pytest.raises(ModelError, match=rf"model\.attn_implementation: varlen .*{said}|{said}"):
        varlen_forward(SimpleNamespace(), *_inputs(2, 2, 8, length=4), None, **asked)


def test_which_attention_reads_boundaries():
    assert all(reads_boundaries(name) for name in ("varlen", "flash_attention_2", "kernels-community/flash-attn3"))
    assert not any(reads_boundaries(name) for name in ("eager", "sdpa", "blockwise", "flex_attention"))
    cpu, gpu, config = torch.device("cpu"), torch.device("cuda"), SimpleNamespace(layer_types=None)
    for name in ("varlen", "flash_attention_2"):
        assert str(why_not(name, gpu, torch.float32, config)).startswith(f"{name} supports 16-bit dtypes only")
    assert why_not("varlen", gpu, torch.bfloat16, config) is None
    assert why_not("varlen", cpu, torch.float32, config) is None
    chunked = SimpleNamespace(layer_types=["full_attention", "chunked_attention"])
    assert "not support chunked_attention" in str(why_not("varlen", cpu, torch.float32, chunked))
    hybrid = SimpleNamespace(layer_types=["full_attention", "linear_attention"])  # twin and probe judge the others
    assert why_not("varlen", cpu, torch.float32, hybrid) is None
    dropping = SimpleNamespace(layer_types=None, attn_pdrop=0.1)
    assert "not support attention dropout" in str(why_not("varlen", cpu, torch.float32, dropping))
    capped = SimpleNamespace(layer_types=None, attn_logit_softcapping=50.0)
    assert why_not("varlen", cpu, torch.float32, capped) is None
    assert "not support soft caps" in str(why_not("varlen", gpu, torch.bfloat16, capped))


def test_every_attention_runs_on_a_cpu_or_is_refused_by_name():
    names = words_of(field_types(ModelSettings)["attn_implementation"])
    cpu, config = torch.device("cpu"), SimpleNamespace(layer_types=None)
    refused = {name: why for name in names if (why := why_not(name, cpu, torch.bfloat16, config))}
    assert refused.keys() == {"flash_attention_2", "flex_attention"}
    assert all(why.startswith(f"{name} ") and "on a CPU; choose blockwise" in why for name, why in refused.items())
    with pytest.raises(ModelError, match=r"^model\.attn_implementation: flex_attention has no backward on CPUs"):
        attention_candidates(cpu, "flex_attention", LlamaConfig(), torch.bfloat16)


def _rows(*lengths):
    every = torch.ones(max(lengths), dtype=torch.bool)
    return [(torch.arange(10 * n, 10 * n + n), every[:n]) for n in lengths]


def test_a_flat_micro_batch_has_all_four_arguments_and_no_padding_between():
    batch = flat_batch([_rows(3, 2), _rows(4)], max_length=64, step=4, varlen=True, number=7, rows=(5, 6, 8))
    assert batch.input_ids.tolist() == [[30, 31, 32, 20, 21, 40, 41, 42, 43, 0, 0, 0]]
    first = IGNORE
    assert batch.labels.tolist() == [[first, 31, 32, first, 21, first, 41, 42, 43, first, first, first]]
    assert batch.position_ids is not None and batch.sequences is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3, 0, 1, 2]]
    assert batch.sequences.boundaries.tolist() == [0, 3, 5, 9, 12] and batch.sequences.boundaries.dtype == torch.int32
    assert (batch.number, batch.rows) == (7, (5, 6, 8))
    inputs = decoder_inputs(batch.input_ids, batch.position_ids, batch.sequences)
    assert inputs["cu_seq_lens_q"] is inputs["cu_seq_lens_k"] is batch.sequences.boundaries
    assert inputs["max_length_q"] == inputs["max_length_k"] == 64 and "attention_mask" not in inputs


def test_boundaries_come_in_few_sizes_with_the_last_one_repeated():
    def boundaries(count: int) -> list[int]:
        batch = flat_batch([_rows(*[3] * count)], max_length=64, step=1, varlen=True)
        assert batch.sequences is not None and batch.sequences.max_length == 64
        return batch.sequences.boundaries.tolist()

    assert boundaries(5) == [0, 3, 6, 9, 12, 15, 15, 15, 15]
    assert {len(boundaries(count)) for count in range(1, 40)} == {3, 5, 9, 17, 33, 65}


def test_flat_rows_are_supervised_as_they_are_in_lines():
    sequences = [_rows(5, 3, 6), _rows(7), _rows(2, 9)]

    def predicted(batch: MicroBatch) -> list[tuple[int, int]]:
        ids, labels = batch.input_ids.flatten(), batch.labels.flatten()
        return [(int(ids[p]), int(labels[p + 1])) for p in batch.supervised]

    flat = flat_batch(sequences, max_length=20, step=8, varlen=True)
    assert predicted(flat) == predicted(pack(sequences))
    assert len(flat.supervised) == sum(n - 1 for n in (5, 3, 6, 7, 2, 9))


@pytest.mark.parametrize("level", [(7, 5), (8, 0), (12, 0)])
def test_varlen_is_refused_on_cards_that_flash_attention_does_not_run_on(monkeypatch, level):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: level)
    refusal = why_not("varlen", torch.device("cuda"), torch.bfloat16, SimpleNamespace(layer_types=None))
    assert (refusal is None) == (level >= (8, 0))
    assert refusal is None or "this GPU has 7.5; choose sdpa" in refusal
    assert "on xpu; choose sdpa" in str(why_not("varlen", torch.device("xpu"), torch.bfloat16, SimpleNamespace()))


def test_flash_attention_without_its_package_is_refused_by_its_own_key(monkeypatch):
    gpu, config = torch.device("cuda"), SimpleNamespace(get_text_config=lambda: SimpleNamespace(layer_types=None))
    for name in ("is_flash_attn_2_available", "is_kernels_available"):
        monkeypatch.setattr(candidates, name, lambda: False)
    with pytest.raises(ModelError, match=r"model\.attn_implementation: flash_attention_2 needs .* flash-attn") as error:
        candidates.attention_candidates(gpu, "flash_attention_2", config, torch.bfloat16)
    assert error.value.exit_code == 2
    monkeypatch.setattr(candidates, "is_flash_attn_2_available", lambda: True)
    assert candidates.attention_candidates(gpu, "flash_attention_2", config, torch.bfloat16) == ("flash_attention_2",)
