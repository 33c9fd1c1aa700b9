"""The plan: shapes known by name, bytes, operations, times, search, and the experiments named by hardware."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import socket

import pytest
import torch

from fsdp_qlora.adapters.linear import use_fused_products
from fsdp_qlora.adapters.lora import attach_lora
from fsdp_qlora.attention.blocks import kept_scores
from fsdp_qlora.cli.compose import compose_config
from fsdp_qlora.cli.overrides import conf_dir
from fsdp_qlora.config.schema import from_dict
from fsdp_qlora.distributed.mesh import degrees
from fsdp_qlora.errors import ConfigError, ModelError
from fsdp_qlora.model.folder import config_for_plan
from fsdp_qlora.model.skeleton import build_skeleton, read_shapes
from fsdp_qlora.plan.activations import layer_activations
from fsdp_qlora.plan.devices import DEVICES, INTERCONNECTS, LINK_SHARE, find_device, find_interconnect
from fsdp_qlora.plan.parameters import fates
from fsdp_qlora.plan.plan import make_plan
from fsdp_qlora.plan.report import report
from fsdp_qlora.plan.search import best, fastest, search
from fsdp_qlora.plan.sizes import parse_bytes
from fsdp_qlora.plan.timing import flops_per_token, step_time
from fsdp_qlora.quant.formats import build_format
from fsdp_qlora.quant.packing import num_rows
from fsdp_qlora.quant.swap import swap_linears
from fsdp_qlora.run.decide import planned_skeleton
from fsdp_qlora.shapes.known import SHAPES, known_config, known_models
from fsdp_qlora.shapes.linears import quantized_linears
from fsdp_qlora.shapes.targets import target_linears
from tests.tiers import some_in_full

PARAMETERS = {  # as the hub counts them
    "gemma-2-27b": 27_227_128_320,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-3-1b": 999_885_952,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-2-7b": 6_738_415_616,
    "llama-3-70b": 70_553_706_496,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b-v0.3": 7_248_023_552,
    "mistral-nemo-12b": 12_247_782_400,
    "mistral-small-24b": 23_572_403_200,
    "mixtral-8x7b": 46_702_792_704,
    "phi-3-mini": 3_821_079_552,
    "phi-4": 14_659_507_200,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-72b": 72_706_203_648,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-14b": 14_768_307_200,
    "qwen3-235b-a22b": 235_093_634_560,
    "qwen3-235b-a22b-2507": 235_093_634_560,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-30b-a3b-2507": 30_532_122_624,
    "qwen3-32b": 32_762_123_264,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "smollm2-1.7b": 1_711_376_384,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "tinyllama-1.1b": 1_100_048_384,
}

EXPERIMENTS = sorted(f.stem for f in (conf_dir() / "experiment").glob("*.yaml") if "gb" in f.stem)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a plan asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@functools.cache
def planned(*overrides: str):
    config, base = planned_skeleton(compose_config("plan", list(overrides)))
    shapes = read_shapes(base)
    return config, shapes, make_plan(config, shapes, config.plan.world_size or 1)


def test_every_known_shape_has_a_known_number_of_parameters():
    assert {f.stem for f in SHAPES.glob("*.json")} - {"names"} == set(PARAMETERS) == set(known_models().values())


@pytest.mark.parametrize("name", some_in_full(PARAMETERS, list(PARAMETERS)[:3]))
def test_known_shapes_have_the_known_numbers_of_parameters(name):
    model = build_skeleton(SHAPES / f"{name}.json", torch.bfloat16, "eager")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_a_model_is_taken_from_a_folder_the_cache_or_what_is_known(tiny_model, tmp_path, monkeypatch):
    assert config_for_plan(str(tiny_model)) == tiny_model
    assert config_for_plan("meta-llama/llama-3.1-70B-instruct") == known_config("meta-llama/Llama-3.1-70B")
    with pytest.raises(ModelError, match=r"Qwen/Qwen3-32B.*hf download Qwen/Qwen3-33B config.json"):
        config_for_plan("Qwen/Qwen3-33B")
    snapshot = tmp_path / "models--me--mine/snapshots/abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--me--mine/refs").mkdir()
    (tmp_path / "models--me--mine/refs/main").write_text("abc")
    shutil.copy(tiny_model / "config.json", snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert config_for_plan("me/mine") == snapshot


def test_there_are_the_nine_experiments():
    assert len(EXPERIMENTS) == 9


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_fits_the_hardware_in_its_name(name):
    config, shapes, plan = planned(f"experiment={name}")
    cards, _, memory = name.rpartition("_")[2].removesuffix("gb").partition("x")
    assert (config.plan.world_size, config.plan.gpu) == (int(cards), f"{memory}GiB")
    assert find_device(config.plan.device).memory == config.plan.gpu
    found = report(config, plan, shapes)
    assert found["fits"], found
    assert found["peak_planned_bytes"] == max(found["bytes_at_moment"].values()) <= plan.bytes.total
    assert found["time"]["step_seconds"] > 0
    # what is stored is known to the byte: 8,452 bytes for 16,384 weights, and the rest in 16 bits
    rows = {x.linear.name: x.rows for x in plan.quantized}
    if config.quant.embeddings == "nf4":
        rows |= dict.fromkeys(("embedding", "head"), num_rows(shapes.vocab_size * shapes.hidden_size))
    assert plan.bytes.base_packed == 8192 * sum(-(-n // plan.shard_size) for n in rows.values())
    assert plan.bytes.base_statistics == 260 * sum(-(-n // plan.shard_size) for n in rows.values())


def test_70b_on_two_cards_of_24_gb():
    config, _, plan = planned("experiment=llama3_70b_2x24gb")
    assert config.fsdp.offload == "activations" and config.data.max_length == 2048
    assert plan.peak <= 21.0 * 2**30
    assert plan.host.offloaded_parameters == 0


def test_405b_on_eight_cards_of_80_gb():
    config, _, plan = planned("experiment=llama3_405b_8x80gb")
    assert (config.data.max_length, config.train.micro_batch_size) == (2048, 2)
    assert plan.peak <= 36e9
    inputs = 2 * 2048 * 16384 * 2  # of one layer
    assert plan.host.offloaded_activations == 126 * inputs
    _, _, kept = planned("experiment=llama3_405b_8x80gb", "fsdp.offload=none")
    assert kept.peak <= 50e9
    assert kept.peak - plan.peak == 124 * inputs


def test_every_parameter_has_one_fate():
    _, shapes, plan = planned("experiment=qwen3_30b_a3b_1x24gb")
    found = fates(plan, shapes)
    assert found["quantized"]["model.layers.*.mlp.experts.gate_up_proj"] == 48
    assert found["kept"]["model.layers.*.mlp.gate.weight"] == 48
    assert found["trained"]["model.layers.*.self_attn.q_proj.lora_A.weight"] == 48
    assert sum(found["quantized"].values()) + sum(found["kept"].values()) == len(shapes.parameters)


def test_what_does_not_fit_is_said():
    config, shapes, plan = planned("experiment=llama3_70b_2x24gb", "plan.gpu=20GiB")
    assert report(config, plan, shapes)["fits"] is False


def test_experts_start_at_rows_of_their_own():
    _, shapes, plan = planned("model.name=Qwen/Qwen3-30B-A3B", "plan.world_size=1", "plan.device=rtx4090")
    packed = [x for x in plan.quantized if x.linear.count > 1]
    experts = [x.linear for x in packed]
    assert {x.count for x in experts} == {128} and len(experts) == 96
    assert all(x.rows == 128 * num_rows(x.linear.out_features * x.linear.in_features) for x in packed)
    assert not set(plan.targets) & {x.name for x in experts}
    flops = flops_per_token(plan, shapes)
    assert flops.forward == pytest.approx(2 * 3.04e9 + 48 * 2 * 4096 * 2048 + 2 * plan.trainable_parameters, rel=0.01)


def test_operations_and_times_by_hand():
    _, shapes, plan = planned("experiment=llama3_70b_2x24gb")
    linears, head = 80 * (2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 8192 * 28672), 128256 * 8192
    adapters, attention = plan.trainable_parameters, 80 * 2 * 8192 * 2048
    flops = flops_per_token(plan, shapes)
    assert flops.forward == 2 * (linears + head + adapters) + attention
    assert flops.backward == 2 * (linears + head) + 4 * adapters + 2.5 * attention
    assert flops.recompute == 2 * (linears + adapters) + attention
    device, link = find_device("RTX 4090"), find_interconnect("12GB/s")
    assert link.rate == pytest.approx(12e9)
    time = step_time(plan, shapes, device, link, prefetch=True)
    # half of everything comes from the other rank: layers twice, the embedding and the head once
    codes = 8452 * (2 * sum(x.rows for x in plan.quantized) + 2 * num_rows(head))
    assert time.gathered_bytes == pytest.approx((codes + 2 * 2 * adapters) / 2, rel=1e-3)
    assert time.gather_seconds == pytest.approx(time.gathered_bytes / 12e9)
    assert time.compute_seconds == pytest.approx(2048 * flops.total / (165e12 * 0.45))
    assert time.micro_batch_seconds >= max(time.compute_seconds + time.dequantize_seconds, time.gather_seconds)
    apart = step_time(plan, shapes, device, link, prefetch=False)
    parts = time.compute_seconds + time.dequantize_seconds + time.gather_seconds
    assert apart.micro_batch_seconds == pytest.approx(parts, rel=0.01)


def test_one_rank_waits_for_the_copies_that_nothing_hides():
    lines = ["experiment=llama3_8b_1x12gb", "fsdp.offload=params", "train.activation_checkpointing=full"]
    _, shapes, plan = planned(*lines)
    device, link = find_device("RTX 4090"), find_interconnect("12GB/s")
    layers, edges = plan.memory.layers, plan.memory.edges
    rate = device.host * 1e9 * LINK_SHARE
    alone = (sum(edge.gathered for edge in edges) + layers[0].gathered + layers[-1].gathered) / rate
    ahead = sum(layer.gathered for layer in (*layers[1:], *layers[:-1])) / rate
    time = step_time(plan, shapes, device, link, prefetch=True)
    assert time.copy_seconds == pytest.approx(alone + ahead)
    computing = time.compute_seconds + time.dequantize_seconds
    assert time.micro_batch_seconds == pytest.approx(max(computing, ahead) + alone)
    apart = step_time(plan, shapes, device, link, prefetch=False)
    assert apart.micro_batch_seconds == pytest.approx(computing + ahead + alone)
    held = [_plan_of("fsdp.prefetch", depth, lines).moments["layer_backward"] for depth in (0, 1, 2)]
    assert held[1] - held[0] == held[2] - held[1] == max(layer.gathered for layer in layers)


def test_one_rank_copies_a_head_in_host_memory_ahead_but_not_an_embedding():
    lines = ["experiment=llama3_8b_1x12gb", "quant.embeddings=none", "train.logits_chunk=256"]
    device, link = find_device("RTX 4090"), find_interconnect("12GB/s")
    edge = 128256 * 4096 * 4  # in float32
    rate = device.host * 1e9 * LINK_SHARE
    for modules, copies, waits in (("head", 1, 0), ("embeddings", 1, 1), ("head,embeddings", 2, 1)):
        _, shapes, plan = planned(*lines, f"fsdp.offload_modules=[{modules}]")
        time = step_time(plan, shapes, device, link, prefetch=True)
        assert time.copy_seconds == pytest.approx(copies * edge / rate)
        computing = time.compute_seconds + time.dequantize_seconds
        assert time.micro_batch_seconds == pytest.approx(computing + waits * edge / rate)


def _plan_of(key, value, lines):
    return planned(*lines, f"{key}={value}")[2]


def test_advice_balances_gathering_and_computing():
    base = ["experiment=llama3_70b_8x80gb", "data.max_length=512", "plan.interconnect=pcie3"]
    config, shapes, plan = planned(*base, "train.micro_batch_size=1")
    (line, *_) = report(config, plan, shapes)["advice"]
    rows = int(line.partition("train.micro_batch_size=")[2].partition(" ")[0])
    times = []
    for number in (rows - 1, rows):
        train = dataclasses.replace(config.train, micro_batch_size=number, global_batch_size=512)
        other = dataclasses.replace(config, train=train)
        times.append(report(other, make_plan(other, shapes, 8), shapes)["time"])
    below, above = times
    assert below["gather_seconds"] > below["compute_seconds"] + below["dequantize_seconds"]
    assert above["gather_seconds"] <= above["compute_seconds"] + above["dequantize_seconds"]
    config, shapes, plan = planned("experiment=llama3_70b_8x80gb")
    assert report(config, plan, shapes)["advice"] == []


def test_search_finds_the_largest_that_fits_and_the_cheapest_first():
    _, shapes, plan = planned("model.name=Qwen/Qwen3-0.6B", "data.max_length=1024", "plan.world_size=2")

    def peak(rows, **changes):
        return plan.memory.plan(dataclasses.replace(plan.settings, micro_batch_size=rows, **changes)).peak

    one = {"accumulation_steps": 1}
    several = peak(8, accumulation_steps=1)
    found = search(plan.memory, plan.settings, plan.batch, several, shapes.max_positions)
    assert [(f.checkpointing, f.offload) for f in found[:3]] == [(c, "none") for c in ("none", "selective", "full")]
    assert found[0].micro_batch_size <= found[1].micro_batch_size < found[2].micro_batch_size
    assert (found[0].micro_batch_size, found[0].peak_bytes) == (8, several)
    assert peak(16, **one) > several
    more, full = found[2].micro_batch_size, {"checkpointing": "full", **one}
    assert more > 8 and peak(more, **full) <= several < peak(2 * more, **full)
    assert best(found) is found[0] and fastest(found) is None
    timed = search(plan.memory, plan.settings, plan.batch, several, 0, lambda s, _: float(s.checkpointing == "full"))
    assert best(timed) is timed[0] and fastest(timed) is timed[2]
    tight = search(plan.memory, plan.settings, plan.batch, peak(1) - 1, shapes.max_positions)
    assert not tight[0].fits and best(tight).checkpointing == "selective"
    assert best(search(plan.memory, plan.settings, plan.batch, 1, shapes.max_positions)) is None
    assert all(f.longest <= shapes.max_positions and f.tokens >= f.micro_batch_size * 1024 for f in found)


@pytest.mark.parametrize(("ranks", "rows", "batch"), [(3, 1, 16), (32, 1, 16), (32, 4, 16), (8, 2, 64)])
def test_ranks_without_a_micro_batch_add_no_tokens(ranks, rows, batch):
    config = from_dict({
        "model": {"name": "meta-llama/Meta-Llama-3-8B"}, "plan": {"gpu": "80GiB", "device": "h100"},
        "train": {"micro_batch_size": rows, "global_batch_size": batch}, "data": {"max_length": 2048},
    })  # fmt: skip
    config, base = planned_skeleton(config)
    shapes = read_shapes(base)
    plan = make_plan(config, shapes, ranks, 70 * 10**9)
    time = report(config, plan, shapes)["time"]
    assert time["tokens_per_second"] * time["step_seconds"] == pytest.approx(batch * 2048)


def test_a_group_that_spans_nodes_gathers_over_the_network(tiny_model):
    seconds = []
    for node in (0, 2):
        config = from_dict({
            "model": {"name": str(tiny_model)}, "plan": {"gpu": "80GiB", "device": "h100"},
            "launcher": {"nproc_per_node": node},
        })  # fmt: skip
        shapes = read_shapes(build_skeleton(tiny_model, torch.bfloat16, "sdpa"))
        values = report(config, make_plan(config, shapes, 4, 70 * 10**9), shapes)
        seconds.append((values["device"]["interconnect"], values["time"]["gather_seconds"]))
    assert seconds[0][0] == "nvlink4" and seconds[1][0] == "infiniband_400g" and seconds[1][1] > seconds[0][1]


def test_no_memory_is_no_amount():
    with pytest.raises(ConfigError, match=r"plan\.gpu"):
        parse_bytes("0GiB")
    with pytest.raises(ConfigError, match=r"plan\.gpu: 24 bytes are not the memory of a device; write it as 24GiB"):
        parse_bytes("24")


def test_names_of_devices_and_interconnects():
    assert {d.interconnect for d in DEVICES.values()} <= INTERCONNECTS.keys()
    assert find_device("h100") is DEVICES["h100"] and find_interconnect("nvlink4").nominal == 450
    with pytest.raises(ConfigError, match="rtx4090"):
        find_device("rtx409")
    for wrong in ("nvlink9", "12", "0GB/s", "1.2.3GB/s"):
        with pytest.raises(ConfigError, match="nvlink4"):
            find_interconnect(wrong)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "blockwise"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_planned_activations_are_what_autograd_keeps(family, attention, tmp_path):
    """Count the storages that one 4-bit layer with adapters saves, parameters left out."""
    if family == "gemma2" and attention != "eager":
        pytest.skip("its soft cap needs eager attention")
    (tmp_path / "config.json").write_text((SHAPES / {"llama": "llama-3.2-1b.json", "qwen3": "qwen3-0.6b.json",
                                                     "gemma2": "gemma-2-2b.json"}[family]).read_text())  # fmt: skip
    small = {"hidden_size": 128, "intermediate_size": 512, "head_dim": 32, "num_attention_heads": 4, "vocab_size": 256}
    small |= {"num_key_value_heads": 4, "num_hidden_layers": 1}  # as many: sdpa on a CPU would repeat fewer
    config = json.loads((tmp_path / "config.json").read_text()) | small
    (tmp_path / "config.json").write_text(json.dumps(config))
    base = build_skeleton(tmp_path, torch.bfloat16, attention)
    shapes = read_shapes(base)
    names = target_linears(shapes, "all-linear")
    swap_linears(base, quantized_linears(shapes), build_format())
    model = attach_lora(base, names, r=4, alpha=4).to_empty(device="cpu")
    use_fused_products(model)
    for parameter in (*model.parameters(), *model.buffers()):
        parameter.data.zero_()
    length = 256
    for parameter in model.parameters():  # FSDP gathers adapters in bfloat16
        parameter.data = parameter.data.bfloat16() if parameter.dtype == torch.float32 else parameter.data
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    hidden = torch.randn(1, length, 128, dtype=torch.bfloat16, requires_grad=True)
    layer, places = base.get_submodule(shapes.layers[0]), torch.arange(length)[None]
    rotary = base.model.rotary_emb(hidden, places)
    mask = torch.zeros(1, 1, length, length, dtype=torch.bfloat16) if attention == "eager" else None
    own |= {t.untyped_storage().data_ptr() for t in (*rotary, hidden)}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = layer(hidden, attention_mask=mask, position_embeddings=rotary, position_ids=places)
    counted = layer_activations(shapes, shapes.layers[0], frozenset(names), 2, False, attention)
    expected = length * (counted.saved + kept_scores(shapes, attention, 2, length))
    # Gemma 2 also keeps the tanh of its scores
    assert sum(saved.values()) == pytest.approx(expected, rel=0.2 if family == "gemma2" else 0.02), out


def test_planning_uses_settings_of_the_library_too(tiny_model):
    config = from_dict({"model": {"name": str(tiny_model)}, "fsdp": {"offload": "all"}, "quant": {"embeddings": "nf4"}})
    plan = make_plan(config, read_shapes(build_skeleton(tiny_model, torch.bfloat16, "sdpa")), 2)
    stored = plan.bytes
    assert (stored.base_packed, stored.adapters, stored.optimizer) == (0, 0, 0)
    assert plan.host.offloaded_parameters > 0


def test_on_an_accelerator_a_whole_chunk_of_logits_is_float32():
    """`heads/logprobs.py` converts a chunk at once there; on a CPU it converts a few rows at a time."""
    from fsdp_qlora.heads.costs import FLOAT_LOGITS_BYTES, LOGIT_COPIES, chunked_bytes

    logits = 256 * 128_256
    assert chunked_bytes(256, 128_256, 2, True) == logits * (2 + 4)
    assert chunked_bytes(256, 128_256, 2, True, capped=True) == logits * (2 + 4 + 4)
    assert chunked_bytes(256, 128_256, 2, False) == LOGIT_COPIES * (logits * 2 + FLOAT_LOGITS_BYTES)


@pytest.mark.parametrize(
    ("device", "num_ranks", "kept"), [("cpu", 1, "true"), ("cpu", 2, "false"), ("cuda", 2, "true")]
)
def test_dense_weights_are_kept_until_backward_on_accelerators_only(tiny_model, device, num_ranks, kept):
    config = from_dict({"model": {"name": str(tiny_model)}, "launcher": {"device": device}})
    shapes = read_shapes(build_skeleton(tiny_model, torch.bfloat16, "sdpa"))
    choice = make_plan(config, shapes, num_ranks, 2**40).choices["quant.cache_dequantized"]
    assert choice.value == kept and ("2 %" in choice.why) == (kept == "false")


def test_the_next_setting_that_holds_less_is_named():
    from dataclasses import replace

    from fsdp_qlora.config.schema import from_dict
    from fsdp_qlora.plan.choices import smaller
    from fsdp_qlora.run.decide import plan_for

    config = from_dict({"model": {"name": "meta-llama/Meta-Llama-3-8B"}, "plan": {"gpu": "80GiB"}})
    plan = plan_for(config, 1)
    memory, settings = plan.memory, replace(plan.settings, cache_dequantized=True, micro_batch_size=4)
    steps = [
        ("quant.cache_dequantized=false", {"cache_dequantized": False}),
        ("train.activation_checkpointing=selective", {"checkpointing": "selective"}),
        ("train.activation_checkpointing=full", {"checkpointing": "full"}),
        ("train.micro_batch_size=2", {"micro_batch_size": 1}),
        ("fsdp.offload=activations", {"offload_activations": True}),
    ]
    for words, change in steps:
        assert str(smaller(memory, settings)).startswith(words)
        settings = replace(settings, **change)
    assert smaller(memory, settings) is None


@pytest.mark.parametrize(("shard", "replicate", "found"), [
    (0, 2, (2, 2)), (2, 2, (2, 2)), (0, 1, (1, 4)),
    (0, 3, r"fsdp\.replicate_degree: 3 does not divide the number of ranks, 4"),
    (2, 3, r"fsdp\.replicate_degree: 3 does not divide"),
    (0, 8, r"fsdp\.replicate_degree: 8 does not divide"),
    (3, 2, r"fsdp\.shard_degree: 3 x .* set fsdp\.shard_degree=0"),
])  # fmt: skip
def test_degrees_that_do_not_fit_the_ranks_name_the_culprit(shard, replicate, found):
    if isinstance(found, tuple):
        assert degrees(shard, replicate, 4) == found
        return
    with pytest.raises(ConfigError, match=found):
        degrees(shard, replicate, 4)
