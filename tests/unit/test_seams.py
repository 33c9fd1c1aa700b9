"""One kind, one room: a kind that does not ship works without a line changed in the package."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from safetensors import safe_open

from fsdp_qlora import adapters, objectives
from fsdp_qlora.adapters.names import trainable_parameters
from fsdp_qlora.cli.export import EXPORTS
from fsdp_qlora.config import choices
from fsdp_qlora.config.schema import from_dict
from fsdp_qlora.distributed.shards import local_tensor
from fsdp_qlora.errors import ConfigError
from fsdp_qlora.load.stream import resident_bytes
from fsdp_qlora.optim.optimizers import OPTIMIZERS, ShardedOptimizer
from fsdp_qlora.optim.sizes import MOMENTS
from fsdp_qlora.quant import formats
from fsdp_qlora.quant.matrices import QuantMatrices
from fsdp_qlora.track.sinks import TRACKERS
from tests import toys
from tests.build import build, essence, losses, metrics, run_fit
from tests.tolerances import BF16_LOSSES

CONF = Path(__file__).resolve().parents[2] / "conf"
TOYS = {
    "format": {"quant": {"name": "row8"}},
    "method": {"lora": {"variant": "scaled"}, "model": {"check": "off"}},  # plain PEFT, the judge, has no such tensor
    "method of PEFT's": {"lora": {"variant": "hira"}, "model": {"check": "always"}},
    "objective": {"objective": {"name": "squared"}},
}


def _groups(rows, toy):
    more = {"data": {"train": rows, "eval_fraction": 0.2}, "checkpoint": {"every_steps": 2}}
    return {name: {**more.get(name, {}), **TOYS[toy].get(name, {})} for name in {*more, *TOYS[toy]}}


def _bytes(ranks, model, rows, toy):
    """Return what this rank holds, and what the plan says of the fullest rank."""
    assert toys  # registers
    prepared = build(ranks, model, **_groups(rows, toy))
    optimizer = ShardedOptimizer(trainable_parameters(prepared.model), prepared.config.optim)
    optimizer.prepare_state(1)
    held = {
        "base": sum(resident_bytes(m) for m in prepared.model.modules() if isinstance(m, QuantMatrices)),
        "adapters": sum(local_tensor(p).numel() * 4 for _, p in trainable_parameters(prepared.model)),
        "optimizer": optimizer.state_bytes(),
    }
    planned = prepared.plan.bytes
    return held, {
        "base": planned.base_packed + planned.base_statistics,
        "adapters": planned.adapters,
        "optimizer": planned.optimizer,
    }


@pytest.mark.parametrize("toy", TOYS)
def test_a_toy_trains_on_two_ranks_resumes_and_is_exported(pool, tiny_model, chat_rows, tmp_path, toy):
    model, rows = str(tiny_model), str(chat_rows)
    held, planned = pool.run(2, _bytes, model, rows, toy)[0]
    assert held == planned
    whole = pool.run(2, run_fit, model, str(tmp_path), "whole", _groups(rows, toy))[0]
    one = pool.run(1, run_fit, model, str(tmp_path), "one", _groups(rows, toy))[0]
    found = losses(whole["metrics"])
    assert found[-1] < found[0]
    assert found == pytest.approx(losses(one["metrics"]), rel=BF16_LOSSES)
    split = {**_groups(rows, toy), "train": {"max_steps": 2}}
    pool.run(2, run_fit, model, str(tmp_path), "split", split)
    pool.run(2, run_fit, model, str(tmp_path), "split", _groups(rows, toy))
    assert [m["step"] for m in essence(metrics(tmp_path / "split")) if "loss" in m] == [1, 2, 3, 4]
    with safe_open(tmp_path / "split/adapter/adapter_model.safetensors", framework="pt") as stored:
        names = {name.rpartition("_proj.")[2] for name in stored.keys()}  # noqa: SIM118
    more = {"method": {"lora_scale"}}
    own = {"method of PEFT's": {"hira_A", "hira_B"}}
    assert names == own.get(toy, {"lora_A.weight", "lora_B.weight"}) | more.get(toy, set())


def test_a_toy_has_at_most_40_lines():
    tree = ast.parse(Path(toys.__file__).read_text())
    sizes = {n.name: n.end_lineno - n.lineno + 1 for n in tree.body if isinstance(n, ast.ClassDef)}
    assert sizes["Row8"] <= 40 and sizes["Squared"] <= 40
    assert sizes["ScaledLinear"] + sizes["Scaled"] <= 40


@pytest.mark.parametrize(
    ("names", "group", "beside"),
    [
        (choices.FORMATS, "quant", {"none"}),
        (choices.METHODS, "lora", {"default", choices.NONE, *choices.STARTS}),
        (choices.OBJECTIVES, "objective", set()),
        (choices.OPTIMIZERS, "optim", set()),
        (choices.TRACKERS, "track", set()),
    ],
)
def test_what_ships_is_what_conf_has(names, group, beside):
    assert set(names.shipped) | beside == {file.stem for file in (CONF / group).glob("*.yaml")}


def test_what_ships_is_what_is_registered():
    assert [formats.build_format(name).name for name in choices.FORMATS.shipped] == list(choices.FORMATS.shipped)
    assert [adapters.build_method(name).name for name in choices.METHODS.shipped] == list(choices.METHODS.shipped)
    assert [objectives.build_objective(n).name for n in choices.OBJECTIVES.shipped] == list(choices.OBJECTIVES.shipped)


@pytest.mark.parametrize(
    ("table", "names"),
    [(OPTIMIZERS, choices.OPTIMIZERS), (TRACKERS, choices.TRACKERS), (EXPORTS, choices.EXPORTS)],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_what_ships_is_a_row_of_its_table(table, names):
    assert set(table) == set(names.shipped)
    with pytest.raises(ConfigError, match=f"{table.kind}: 'adamv' is not one of "):
        table["adamv"]


def test_an_optimizer_that_ships_has_a_size():
    assert {*MOMENTS, "adafactor"} == set(choices.OPTIMIZERS.shipped)


def test_a_registered_name_is_a_setting_and_a_misspelt_one_is_not():
    assert from_dict({"quant": {"name": "row8"}}).quant.name == "row8"
    with pytest.raises(ConfigError, match="Did you mean 'row8'"):
        from_dict({"quant": {"name": "row9"}})


@pytest.mark.parametrize(
    ("build", "name"),
    [(formats.build_format, "nf4"), (adapters.build_method, "rslora"), (objectives.build_objective, "sft")],
)
def test_a_name_that_nothing_has_is_refused_with_the_nearest(build, name):
    with pytest.raises(ConfigError, match=f"'{name}x' is not one of .*{name}.* Did you mean '{name}'"):
        build(name + "x")


def test_a_taken_name_is_refused():
    class Other(formats.NF4):
        """A second format called nf4."""

    with pytest.raises(ValueError, match=r"Other: the format 'nf4' .* by fsdp_qlora\.quant\.formats\.blocks4\.NF4"):
        formats.register(Other)
    assert type(formats.build_format("nf4")) is formats.NF4
    assert formats.register(formats.NF4) is formats.NF4
