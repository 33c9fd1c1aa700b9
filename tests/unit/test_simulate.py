"""Simulated steps: torch's private parts still behave, depths extrapolate, no tensor is real."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.errors import PlanError
from fsdp_qlora.model.skeleton import build_skeleton, read_shapes
from fsdp_qlora.simulate import step
from fsdp_qlora.simulate.depth import counts_of, cut_counts, cut_layers, kept_layers, layer_kinds
from fsdp_qlora.simulate.step import simulate
from fsdp_qlora.simulate.tracker import fake_mode, measure_step, simulated_ranks
from tests.build import config_of


def write_config(folder: Path, **settings: Any) -> Path:
    """Write a config.json alone: a plan needs no weights."""
    shape = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256, "intermediate_size": 512,
        "num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 1024,
        "max_position_embeddings": 512, "tie_word_embeddings": False,
    } | settings  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape))
    return folder


def one_micro_batch(folder: Path, **groups: Any) -> RunConfig:
    """Return settings with one micro-batch of one row a step and rank."""
    return config_of(str(folder), train={"global_batch_size": 2, "micro_batch_size": 1}, **groups)


def test_torchs_private_tracker_still_counts_to_the_byte() -> None:
    """Two units of known sizes, sharded over two ranks: if this fails, torch changed what tracker.py stands on."""
    numel, rows = 256 * 256, 64
    with simulated_ranks(2) as ranks:
        with torch.device("meta"):
            model = torch.nn.Sequential(*(torch.nn.Linear(256, 256, bias=False) for _ in range(2)))
        for layer in model:
            fully_shard(layer, mesh=ranks.mesh)
        fully_shard(model, mesh=ranks.mesh)
        fake = fake_mode()
        with fake:
            model.to_empty(device="cpu")
            x = torch.empty(rows, 256)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        peaks = measure_step(
            model, optimizer, lambda _: model(x).sum().backward(), optimizer.zero_grad, fake
        ).device  # fmt: skip
    by_phase = {(phase, module if module is None else list(model.modules()).index(module)): p
                for (phase, module), p in peaks.items()}  # fmt: skip
    weight, output = numel * 4, rows * 256 * 4
    first, second = by_phase["forward", 1], by_phase["forward", 2]
    assert (first.parameters, first.gather, first.activations) == (weight, 2 * weight, output)
    # torch keeps the first unit's arrival buffer until the second unit has been copied out of its own
    assert second.total == weight + 3 * weight + output
    # the last to be reduced: its buffer and shard, beside the other's shard
    assert by_phase["backward", 1].gradients == weight + 2 * weight // 2 - weight // 2
    assert by_phase["update", None].gradients == weight
    assert not dist.is_initialized()


def test_a_process_with_real_ranks_is_refused(tiny_model: Path) -> None:
    with (
        simulated_ranks(2),
        pytest.raises(PlanError, match=r"plan\.simulate: this process already has a process group"),
    ):
        simulate(config_of(str(tiny_model)), 2)


@pytest.mark.full
def test_an_extrapolated_peak_is_that_of_the_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = one_micro_batch(write_config(tmp_path / "nine", num_hidden_layers=9), data={"max_length": 128})
    cut = simulate(config, 2)
    monkeypatch.setattr(step, "WHOLE_LAYERS", 9)
    whole = simulate(config, 2)
    assert cut.depths == (4, 6, 8) and whole.depths == (9,) and whole.checked is None
    assert cut.peak_bytes == pytest.approx(whole.peak_bytes, rel=1e-3)
    assert cut.place == whole.place
    assert cut.checked is not None and cut.checked < 1e-3


@pytest.mark.full
def test_a_model_that_does_not_extrapolate_is_simulated_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_config(tmp_path / "three", num_hidden_layers=3)
    monkeypatch.setattr(step, "WHOLE_LAYERS", 2)
    monkeypatch.setattr(step, "TOLERANCE", -1.0)
    found = simulate(one_micro_batch(folder), 2)
    assert found.depths == (3,) and found.checked is None


@pytest.mark.full
def test_layers_of_several_kinds_are_cut_in_proportion(tmp_path: Path) -> None:
    """Gemma 3: five layers of six look at a window; the lists in the config that follow the layers are cut too."""
    folder = write_config(
        tmp_path / "gemma", architectures=["Gemma3ForCausalLM"], model_type="gemma3_text", num_hidden_layers=18,
        head_dim=32, sliding_window=64,
    )  # fmt: skip
    base = build_skeleton(folder, torch.bfloat16, "sdpa")
    shapes = read_shapes(base)
    kinds = layer_kinds(base, shapes)
    assert counts_of(kinds) == (15, 3)
    assert cut_counts((15, 3)) == ([(4, 3), (6, 3)], (8, 3))
    kept = kept_layers(kinds, (2, 2))
    assert kept == [0, 5, 16, 17]
    cut_layers(base, shapes, kept)
    assert base.config.layer_types == ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    assert base.config.num_hidden_layers == 4 and len(read_shapes(base).layers) == 4
    found = simulate(one_micro_batch(folder, data={"max_length": 128}), 2)
    assert found.depths == (7, 9, 11) and found.checked is not None and found.checked < 0.01


@pytest.mark.full
def test_more_ranks_and_replicas_hold_what_they_should(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "two", num_hidden_layers=2)
    again = {"cache_dequantized": "false"}  # or one rank would keep dense weights, too
    whole, half = (simulate(one_micro_batch(folder, quant=again), n).peak for n in (1, 2))
    assert half.parameters == pytest.approx(whole.parameters / 2, rel=0.02)
    replicas = simulate(one_micro_batch(folder, quant=again, fsdp={"shard_degree": 2, "replicate_degree": 2}), 4).peak
    assert replicas.parameters == half.parameters


def test_embedding_and_head_are_not_gathered_for_backward(tmp_path: Path) -> None:
    """A large vocabulary: only forward may hold the gathered embedding or head."""
    folder = write_config(tmp_path / "words", num_hidden_layers=2, vocab_size=65536, hidden_size=128)
    places = simulate(one_micro_batch(folder), 2).places
    whole = 65536 * 128 * 2
    assert max(peak.gather for name, peak in places.items() if name.startswith("forward")) >= 2 * whole
    backward = {name: peak.gather for name, peak in places.items() if name.startswith("backward of the")}
    assert "backward of the last layer" in backward and max(backward.values()) < whole, backward
