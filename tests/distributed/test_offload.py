"""Where parameters and activations lie, and how early they are gathered, changes no bit of a training."""

from __future__ import annotations

import copy
import itertools
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard

from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.parallel.copy_ahead import CopyAhead, host_stages
from fsdp_qlora.parallel.shard import host_modules
from fsdp_qlora.run.fit import fit
from tests.build import build, essence, losses, metrics, run_fit, whole
from tests.pool import RankError
from tests.tiers import some_in_full
from tests.tiny import make_model
from tests.tolerances import BF16_LOSSES, apart

WHERE = ("params", "activations", "all")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a tiny model with enough layers for some to be in host memory while others compute."""
    return make_model(tmp_path_factory.mktemp("models") / "deep", num_hidden_layers=5, hidden_size=64)


def _train(pool, num_ranks, model, rows, root, name, layout="shard", **groups):
    settings = copy.deepcopy(groups)
    settings["data"] |= {"train": str(rows), "max_length": 64, "eval_fraction": 0.1}
    found = pool.run(num_ranks, run_fit, str(model), str(root), name, settings, layout=layout)[0]
    numbers = [*essence(found["metrics"]), *found["summary"]["samples"]]
    return numbers, load_file(root / name / "adapter" / "adapter_model.safetensors")


def _groups(precision="bf16", checkpointing="none", prompts=(), **fsdp):
    train = {
        "max_steps": 2, "global_batch_size": 6, "micro_batch_size": 2, "activation_checkpointing": checkpointing,
        "sample_prompts": list(prompts), "sample_tokens": 3,
    }  # fmt: skip
    packing = {"packing": checkpointing == "full"}  # a probe with forward and backward before the training
    return {
        "train": train, "fsdp": fsdp, "precision": {"name": precision}, "lora": {"dropout": 0.1}, "data": packing,
    }  # fmt: skip


_AS_IT_IS: dict[str, tuple] = {}


def _as_it_is(pool, num_ranks, model, rows, root, layout, **groups):
    key = str((model, num_ranks, layout, sorted(groups.items())))
    if key not in _AS_IT_IS:
        name = f"as-it-is-{len(_AS_IT_IS)}"
        _AS_IT_IS[key] = _train(pool, num_ranks, model, rows, root, name, layout, **_groups(**groups))
    lines, adapter = _AS_IT_IS[key]
    assert len(set(losses(lines))) == 2
    return lines, adapter


def _compare(pool, model, rows, root, num_ranks, others, layout="shard", **groups):
    run = [pool, num_ranks, model, rows, root]
    for number, other in enumerate(others):
        base = {}
        if num_ranks == 1 and (other.get("offload") in ("params", "all") or "offload_modules" in other):
            base = {"offload": "params"}  # one rank uses FSDP for these alone, which rounds gradients to bf16
        lines, adapter = _as_it_is(*run, layout, **{**groups, **base})
        if base:
            without, _ = _as_it_is(*run, layout, **groups)
            assert max(apart(losses(lines), losses(without))) < BF16_LOSSES
        found_lines, found = _train(*run, f"other{number}", layout, **_groups(**{**groups, **other}))
        assert found_lines == lines
        assert found.keys() == adapter.keys()
        assert all(torch.equal(found[name], adapter[name]) for name in adapter)


CASES = [(1, "full", ["all"]), (2, "none", ["params", "activations"]), (2, "full", ["all"])]


@pytest.mark.parametrize(("num_ranks", "checkpointing", "offloads"), some_in_full(CASES, CASES[2:]))
def test_offload_changes_no_bit(pool, model, chat_rows, tmp_path, num_ranks, checkpointing, offloads):
    others = [{"offload": where} for where in offloads]
    _compare(pool, model, chat_rows, tmp_path, num_ranks, others, checkpointing=checkpointing)


@pytest.mark.full
def test_offload_with_hybrid_sharding_changes_no_bit(pool, model, chat_rows, tmp_path):
    other = [{"offload": "all", "prefetch": 2}]
    # Answers too: transformers synchronises them over all ranks there are, so here, where all four take part.
    groups = {"replicate_degree": 2, "checkpointing": "full", "prompts": ("the quick",)}
    _compare(pool, model, chat_rows, tmp_path, 4, other, "hybrid", **groups)


MODULES = (["head", "embeddings", "norms"], ["*.layers.[0-2].*"])


@pytest.mark.parametrize(
    ("num_ranks", "checkpointing", "offload"),
    some_in_full(itertools.product((1, 2, 3), ("none", "full"), ("none", *WHERE)), [(2, "none", "all")]),
)
def test_modules_on_the_host_change_no_bit(pool, model, chat_rows, tmp_path, num_ranks, checkpointing, offload):
    others = [{"offload": offload, "offload_modules": modules} for modules in MODULES]
    _compare(pool, model, chat_rows, tmp_path, num_ranks, others, checkpointing=checkpointing)


@pytest.mark.full
def test_selective_checkpointing_goes_with_the_head_alone(pool, model, chat_rows, tmp_path):
    _compare(pool, model, chat_rows, tmp_path, 2, [{"offload_modules": ["head"]}], checkpointing="selective")
    with pytest.raises(RankError, match="selective does not work with"):
        pool.run(2, _on_host, str(model), ["norms"], "selective")


def _on_host(ranks: Ranks, folder: str, modules: list[str], checkpointing: str = "auto") -> dict[str, int]:
    """Return planned and held bytes of what stays in host memory, and how many parameters that are."""
    train = {"activation_checkpointing": checkpointing}
    prepared = build(ranks, folder, fsdp={"offload_modules": modules}, train=train)
    held = {
        name: parameter.to_local().nbytes
        for name, parameter in prepared.model.named_parameters()
        if parameter.dtype == torch.float32 and not parameter.requires_grad
    }
    assert all(p.to_local().device.type == "cpu" for n, p in prepared.model.named_parameters() if n in held)
    return {
        "planned": prepared.plan.host.offloaded_parameters, "held": sum(held.values()), "parameters": len(held),
        "planned_parameters": len(prepared.plan.offloaded), "kept": prepared.plan.bytes.base_kept,
    }  # fmt: skip


def test_what_is_planned_in_host_memory_is_there(pool, tmp_path):
    folder = make_model(tmp_path / "untied", tie_word_embeddings=False)
    for num_ranks in (1, 2, 3):
        found = pool.run(num_ranks, _on_host, str(folder), ["head", "*.norm", "*.0.*"])[0]
        assert found["planned"] == found["held"] > 0
        assert found["parameters"] == found["planned_parameters"] == 4
        without = pool.run(num_ranks, _on_host, str(folder), [])[0]
        assert without["held"] == 0 < found["held"] // 2 == without["kept"] - found["kept"]


@pytest.mark.parametrize(
    ("modules", "said"),
    [(["haed"], "'haed' matches no module"), (["*.q_proj"], "everything that '*.q_proj' matches is quantized")],
)
def test_modules_that_cannot_stay_on_the_host_are_refused(pool, tiny_model, modules, said):
    with pytest.raises(RankError, match=re.escape(f"fsdp.offload_modules: {said}")):
        pool.run(2, _on_host, str(tiny_model), modules)


@pytest.mark.full
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize(
    ("num_ranks", "layout"), [(1, "shard"), (2, "shard"), (3, "shard"), (4, "shard"), (4, "hybrid")]
)
def test_every_offload_changes_no_bit(
    pool, model, chat_rows, tmp_path, num_ranks, layout, reshard, checkpointing, precision
):
    offloads = [{"offload": where, "prefetch": depth} for depth, where in enumerate(WHERE, start=1)]
    groups = {"precision": precision, "checkpointing": checkpointing, "reshard_after_forward": reshard}
    replicas = 2 if layout == "hybrid" else 1
    _compare(pool, model, chat_rows, tmp_path, num_ranks, offloads, layout, replicate_degree=replicas, **groups)


@pytest.mark.parametrize("depth", some_in_full([0, 2, 3, 9], [3]))
def test_prefetch_changes_no_bit(pool, model, chat_rows, tmp_path, depth):
    _compare(pool, model, chat_rows, tmp_path, 2, [{"prefetch": depth}], checkpointing="none")


def _ahead(ranks: Ranks, folder: str, depth: int) -> list[tuple[list[int], list[int]]]:
    layers = list(build(ranks, folder, fsdp={"prefetch": depth}).model.base.model.layers)
    states = [layer._get_fsdp_state() for layer in layers]  # the only place where FSDP2 says what it was told
    return [
        tuple([states.index(s) for s in found] for found in (x._states_to_forward_prefetch, x._states_to_backward_prefetch))
        for x in states
    ]  # fmt: skip


def test_prefetch_names_the_layers_that_come_next(pool, model):
    assert pool.run(2, _ahead, str(model), 1)[0] == [([], [])] * 5
    assert pool.run(2, _ahead, str(model), 0)[0] == [([], [n]) for n in range(5)]  # itself: nothing more to gather
    assert pool.run(2, _ahead, str(model), 2)[0] == [
        ([1, 2], []), ([2, 3], [0]), ([3, 4], [1, 0]), ([4], [2, 1]), ([], [3, 2]),
    ]  # fmt: skip


def _note_unshards(layers: list, calls: list[int], stage: int | None = None) -> None:
    for place, layer in enumerate(layers):
        assert isinstance(layer, FSDPModule)

        def noting(_place: int = place if stage is None else stage, _unshard=layer.unshard) -> None:
            calls.append(_place)
            _unshard()

        layer.unshard = noting


def _fit_ahead(ranks: Ranks, folder: str, root: str, groups: dict, depth: int) -> dict:
    """Train with layers copied ahead over a CPU's streams, which do nothing, so that all else is that of a GPU."""
    prepared = build(ranks, folder, run={"output_root": root, "name": f"ahead{depth}"}, **groups)
    layers, calls = list(prepared.model.base.model.layers), []
    _note_unshards(layers, calls)
    CopyAhead(layers, depth, ranks.device)
    fit(prepared)
    return {"metrics": metrics(Path(root) / f"ahead{depth}"), "calls": calls}


AHEAD = [("full", 1), ("none", 2), ("none", 1), ("full", 2), ("full", 9)]


@pytest.mark.parametrize(("checkpointing", "depth"), some_in_full(AHEAD, AHEAD[:2]))
def test_layers_copied_ahead_change_no_bit(pool, model, chat_rows, tmp_path, checkpointing, depth):
    groups = _groups(checkpointing=checkpointing, offload="params")
    groups["data"] |= {"train": str(chat_rows), "max_length": 64, "eval_fraction": 0.1}
    expected = pool.run(1, run_fit, str(model), str(tmp_path), "as-it-is", groups)[0]
    found = pool.run(1, _fit_ahead, str(model), str(tmp_path), groups, depth)[0]
    assert essence(found["metrics"]) == essence(expected["metrics"])
    # Every layer but the first of its pass is copied ahead, once; an evaluation has no backward.
    passes = "".join(map(str, found["calls"]))
    assert passes.count("12343210") >= 2 * 3  # steps, and micro-batches of each
    assert not passes.replace("12343210", "").replace("1234", "")


def _fit_modules_ahead(ranks: Ranks, folder: str, root: str, groups: dict, depth: int) -> dict:
    """Train with modules copied ahead over a CPU's streams."""
    prepared = build(ranks, folder, run={"output_root": root, "name": f"modules{depth}"}, **groups)
    base = prepared.model.base
    layers, on_host = list(base.model.layers), host_modules(base, prepared.plan.offloaded)
    stages, calls = host_stages(layers, on_host, base.get_input_embeddings()), []
    for place, units in enumerate(stages):
        _note_unshards(units, calls, place)
    CopyAhead(layers, depth, ranks.device, stages)
    fit(prepared)
    return {"metrics": metrics(Path(root) / f"modules{depth}"), "calls": calls, "sizes": list(map(len, stages))}


@pytest.mark.parametrize(("checkpointing", "depth"), some_in_full(AHEAD, AHEAD[:1]))
def test_modules_copied_ahead_change_no_bit(pool, model, chat_rows, tmp_path, checkpointing, depth):
    groups = _groups(checkpointing=checkpointing)
    groups["fsdp"] = groups.get("fsdp", {}) | {"offload_modules": ["head", "embeddings", "norms"]}
    groups["data"] |= {"train": str(chat_rows), "max_length": 64, "eval_fraction": 0.1}
    expected = pool.run(1, run_fit, str(model), str(tmp_path), "modules", groups)[0]
    found = pool.run(1, _fit_modules_ahead, str(model), str(tmp_path), groups, depth)[0]
    assert essence(found["metrics"]) == essence(expected["metrics"])
    *inside, after = found["sizes"]
    assert after and all(inside)
    # Forward copies all stages but the first, backward all layers but the last
    last, calls = len(inside), found["calls"]
    assert calls.count(last) > 0 and calls.count(0) > 0 and max(calls) == last
    assert calls.count(last) % after == 0 and calls.count(0) % inside[0] == 0


class _Chain(nn.Module):
    """Three layers, of which one can be skipped."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor, skipped: int | None = None) -> torch.Tensor:
        for place, layer in enumerate(self.layers):
            x = x if place == skipped else layer(x)
        return x


def _skipping(ranks: Ranks) -> list[float]:
    model = _Chain()
    for layer in (*model.layers, model):
        fully_shard(layer, mesh=ranks.mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
    CopyAhead(list(model.layers), 1, ranks.device)
    found = []
    for skipped in (None, 1, None):
        with torch.no_grad():
            found.append(model(torch.ones(1, 4), skipped).sum().item())
            for parameter in model.parameters():
                parameter.mul_(0.5)
    return found


def test_a_layer_that_was_skipped_is_not_used_as_it_was(pool):
    whole, _, eighth = pool.run(1, _skipping)[0]
    assert eighth == pytest.approx(whole / 4**3)


def _policies(ranks: Ranks, folder: str, offload: str) -> set[str]:
    from fsdp_qlora.parallel import shard

    original, found = shard.fully_shard, set()

    def look(*args, **kwargs):
        found.add(repr(kwargs["offload_policy"]))
        return original(*args, **kwargs)

    shard.fully_shard = look
    try:
        build(ranks, folder, fsdp={"offload": offload})
    finally:
        shard.fully_shard = original
    return found


def test_every_unit_is_offloaded_where_asked(pool, model):
    for offload in ("params", "all"):
        assert pool.run(2, _policies, str(model), offload)[0] == {"CPUOffloadPolicy(pin_memory=False)"}
    for offload in ("none", "activations"):
        assert pool.run(2, _policies, str(model), offload)[0] == {"OffloadPolicy()"}


def _moved(ranks: Ranks, folder: str, rows: str, root: str, checkpointing: str) -> dict[str, int]:
    """Train; count what autograd saved in the layers, what was moved, and whether it was a parameter."""
    from fsdp_qlora.parallel.offload import HostActivations, _Kept
    from fsdp_qlora.run.fit import fit

    pack, count = HostActivations._pack, {"parameter": 0, "parameter moved": 0, "moved": 0, "in place": 0, "largest": 0}
    parameters: list[torch.nn.Parameter] = []
    seen: list[HostActivations] = []

    def look(self, tensor):
        packed = pack(self, tensor)
        storage, moved = tensor.untyped_storage().data_ptr(), isinstance(packed, _Kept)
        is_parameter = any(p.untyped_storage().data_ptr() == storage for p in parameters)
        count["parameter"] += is_parameter
        count["parameter moved"] += is_parameter and moved
        count["moved"] += moved
        count["in place"] += moved and packed.host.untyped_storage().data_ptr() == storage
        count["largest"] = max(count["largest"], tensor.nbytes if moved else 0)
        seen.append(self)
        return packed

    HostActivations._pack = look
    try:
        groups = _groups(checkpointing=checkpointing, offload="activations")
        groups["data"] = {"train": rows}
        prepared = build(ranks, folder, run={"output_root": root, "name": checkpointing}, **groups)
        count.update(dict.fromkeys(count, 0))  # the checks at the start run layers, too
        seen.clear()

        def gathered(layer, *_):
            parameters[:] = layer.parameters()

        for layer in prepared.model.base.model.layers:
            layer.register_forward_pre_hook(gathered)
        fit(prepared)
    finally:
        HostActivations._pack = pack
    return count | {"out": seen[0].bytes_out, "back": seen[0].bytes_back}


def test_saved_tensors_lie_elsewhere_and_parameters_are_left_alone(pool, model, chat_rows, tmp_path):
    found = {kind: pool.run(2, _moved, str(model), str(chat_rows), str(tmp_path), kind)[0] for kind in ("none", "full")}
    for count in found.values():
        assert count["parameter moved"] == 0
        assert count["in place"] == 0
        assert 0 < count["back"] < count["out"], "the last layers' are still there when backward begins"
    assert found["none"]["parameter"] > 100
    # 5 layers x 2 micro-batches x 2 steps, and one tensor each: the layer's input
    assert (found["full"]["moved"], found["full"]["parameter"]) == (20, 0)
    assert found["none"]["out"] > 10 * found["full"]["out"]


def _state(ranks: Ranks, folder: str, rows: str, root: str, steps: int, offload: str) -> dict:
    from fsdp_qlora.distributed.signals import StopSignals
    from fsdp_qlora.run.fit import _tracker
    from fsdp_qlora.run.folder import RunFolder
    from fsdp_qlora.run.training import Training

    groups = _groups(offload=offload)
    groups["train"]["max_steps"] = steps
    groups["data"]["train"] = rows
    prepared = build(
        ranks, folder, run={"output_root": root, "name": "r"}, schedule={"name": "constant"}, **groups
    )  # fmt: skip
    run_folder = RunFolder(root, "r")
    run_folder.create()
    training = Training(prepared, run_folder)
    training.resume()
    with _tracker(training, run_folder) as tracker:
        training.run(tracker, StopSignals())
    return {n: whole(t).clone() for n, t in training._tensors().items()}


@pytest.mark.full
@pytest.mark.parametrize(("first", "second"), [("all", "none"), ("none", "all")])
def test_a_resume_may_offload_otherwise(pool, model, chat_rows, tmp_path, first, second):
    run = [_state, str(model), str(chat_rows)]
    whole = pool.run(2, *run, str(tmp_path / "whole"), 2, "none")[0]
    pool.run(2, *run, str(tmp_path / "split"), 1, first)
    rest = pool.run(2, *run, str(tmp_path / "split"), 2, second)[0]
    assert rest.keys() == whole.keys()
    assert all(torch.equal(rest[name], whole[name]) for name in whole)
