"""Bytes that the plan lacked until steps were simulated on an accelerator (ADR 0016)."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig

from fsdp_qlora.config.rules import failures
from fsdp_qlora.config.schema import from_dict
from fsdp_qlora.plan.plan import TrainPlan
from fsdp_qlora.run.decide import plan_for

LENGTH, LAYERS, HEADS, WIDTH, KEY_WIDTH, VOCABULARY = 2048, 3, 32, 4096, 1024, 128256
"""Llama-3-8B's, but for the number of layers."""


@pytest.fixture(scope="module", autouse=True)
def _model(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("model")
    LlamaConfig(
        hidden_size=WIDTH, intermediate_size=14336, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KEY_WIDTH * HEADS // WIDTH, vocab_size=VOCABULARY, tie_word_embeddings=False,
    ).save_pretrained(folder)  # fmt: skip
    _FOLDER.append(str(folder))


_FOLDER: list[str] = []


def _plan(ranks: int = 1, **groups: Any) -> TrainPlan:
    """Plan with one row of 2,048 tokens a micro-batch and no ``auto`` that depends on memory."""
    values = {
        "model": {"name": _FOLDER[-1], "attn_implementation": "sdpa"},
        "plan": {"gpu": "80GiB"},
        "data": {"max_length": LENGTH},
        "train": {"global_batch_size": ranks, "micro_batch_size": 1, "activation_checkpointing": "none"},
        "quant": {"cache_dequantized": "false"},
    }
    for name, settings in groups.items():
        values[name] = {**values.get(name, {}), **settings}
    return plan_for(from_dict(values), ranks)


def test_sdpa_of_packed_rows_has_a_mask_and_repeated_keys_in_each_layer() -> None:
    repeated = 2 * (WIDTH - KEY_WIDTH) * LENGTH * 2  # keys and values of each head, in bf16
    masks = LENGTH * LENGTH * 2  # in the queries' dtype
    more = _plan(data={"packing": True}).bytes.activations - _plan().bytes.activations
    assert more == LAYERS * (repeated + masks) + LENGTH * LENGTH  # and one of bool for all layers
    assert 32 * (repeated + masks) == pytest.approx(1.07e9, rel=0.01)  # 8B's
    flat = {"model": {"attn_implementation": "varlen"}}
    assert _plan(data={"packing": True}, **flat).bytes == _plan(**flat).bytes


def test_sdpa_in_float32_keeps_scores_of_grouped_heads() -> None:
    fp32 = {"precision": {"name": "fp32"}}
    scores, repeated = HEADS * LENGTH * LENGTH * 4, 2 * (WIDTH - KEY_WIDTH) * LENGTH * 4
    assert scores == pytest.approx(537e6, rel=0.001)
    kept, masked = (_plan(data={"packing": packed}, **fp32).bytes.activations for packed in (False, True))
    # with a mask there is a kernel; keys and values are repeated either way
    assert kept - masked >= LAYERS * (scores - LENGTH * LENGTH * 4) - LENGTH * LENGTH
    grouped = _plan(**fp32).memory.activations[0]
    assert grouped.kept_positions == HEADS * 4
    assert grouped.saved - _plan(model={"attn_implementation": "flex_attention"}, **fp32).memory.activations[
        0
    ].saved == (repeated // LENGTH)


def test_dense_weights_do_not_travel_with_activations() -> None:
    def chosen(offload: str) -> bool:
        return _plan(fsdp={"offload": offload}, quant={"cache_dequantized": "auto"}).settings.cache_dequantized

    assert chosen("none") and not chosen("activations") and not chosen("all")
    config = from_dict({"fsdp": {"offload": "activations"}, "quant": {"cache_dequantized": "true"}})
    assert any(failure.startswith("quant.cache_dequantized: true keeps") for failure in failures(config))


def test_prefetching_layers_does_not_prefetch_the_head() -> None:
    heads = {depth: _plan(2, fsdp={"prefetch": depth}).moments["head"] for depth in (0, 1, 2)}
    assert len(set(heads.values())) == 1


def test_a_head_in_host_memory_is_on_the_device_only_to_be_gathered() -> None:
    apart = _plan(2, fsdp={"offload_modules": ["head"]})
    together = _plan(2)
    assert together.peak - apart.peak == VOCABULARY // 2 * WIDTH * 2  # its shard, in bf16
    assert apart.host.offloaded_parameters == VOCABULARY // 2 * WIDTH * 4


def test_host_memory_holds_gradients_and_temporaries_too() -> None:
    for name, temporaries in (("adamw", 1), ("adamw_8bit", 0)):  # the root of the second moments
        optim = {"optim": {"name": name}}
        plan, other = _plan(2, fsdp={"offload": "params"}, **optim), _plan(2, **optim).bytes
        fixed = other.base_packed + other.base_statistics + other.base_kept + other.adapters + other.optimizer
        assert plan.host.offloaded_parameters == fixed + (1 + temporaries) * other.adapters
        both = _plan(2, fsdp={"offload": "all"}, **optim).host  # which are there once activations are not
        assert both.offloaded_parameters == fixed and both.offloaded_activations > 2 * other.adapters


def test_small_activations_stay_on_the_device() -> None:
    """Tensors below 1 MiB are not moved (`parallel/offload.py`): here keys and values, and with few tokens all."""
    offload = {"fsdp": {"offload": "activations"}}
    few = _plan(data={"max_length": 16}, **offload)
    assert few.host.offloaded_activations == 0
    assert few.bytes.activations == _plan(data={"max_length": 16}).bytes.activations
    tokens = 256  # of which keys and values take 2 x 512 KiB in each layer
    some, none = _plan(data={"max_length": tokens}, **offload), _plan(data={"max_length": tokens})
    stays = some.memory.kept.all(some.settings).stays
    assert stays == LAYERS * 2 * KEY_WIDTH * tokens * 2
    once_more = LAYERS * WIDTH * tokens * 2  # attention's output, which attention and the adapter after it save
    assert some.host.offloaded_activations == none.memory.kept.all(none.settings).stays - stays + once_more
    recomputed = {"train": {"activation_checkpointing": "full"}, **offload}
    assert _plan(data={"max_length": 64}, **recomputed).host.offloaded_activations == 0  # inputs of 512 KiB
    assert _plan(data={"max_length": 128}, **recomputed).host.offloaded_activations == LAYERS * 128 * WIDTH * 2


def test_what_selective_checkpointing_keeps_is_not_moved() -> None:
    selective = {"activation_checkpointing": "selective"}
    some, none = (_plan(train=selective, fsdp={"offload": where}) for where in ("activations", "none"))
    inputs = LAYERS * LENGTH * WIDTH * 2
    assert some.host.offloaded_activations == inputs
    assert some.memory.kept.all(some.settings).stays == none.memory.kept.all(none.settings).stays - inputs
