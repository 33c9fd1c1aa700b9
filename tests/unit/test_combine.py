"""Several adapters made one: PEFT's own ``add_weighted_adapter`` is the judge, and for rsLoRA the formula."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from fsdp_qlora.adapters.combine import Weighted, combine, squares
from fsdp_qlora.adapters.folder import read_adapter_config, stored_modules
from fsdp_qlora.adapters.served import BASE
from fsdp_qlora.cli.export import run
from fsdp_qlora.config.schema import from_dict
from fsdp_qlora.config.verb_rules import check_verb
from fsdp_qlora.errors import ConfigError, ModelError
from fsdp_qlora.export.combined import combine_adapters
from tests.distributed.test_many_adapters import make_adapters, stock

EQUAL = {
    "a": lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "b": lambda: peft.LoraConfig(r=4, lora_alpha=3, target_modules=["q_proj", "v_proj"]),
}
UNEQUAL = EQUAL | {
    "b": lambda: peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "k_proj"], rank_pattern={"k_proj": 5}),
    "c": lambda: peft.LoraConfig(r=3, lora_alpha=3, target_modules=["v_proj"]),
}
WEIGHTS = {"a": 0.7, "b": -1.5, "c": 0.25}


class _Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(12, out, bias=False) for out in (10, 8, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)


def _made(tmp_path: Path, configs: dict[str, Any]) -> dict[str, Path]:
    return {name: Path(folder) for name, folder in make_adapters(_Base(), tmp_path, configs).items()}


def _changes(model: Any, name: str) -> dict[str, torch.Tensor]:
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A") and name in m.lora_A}
    return {n: m.get_delta_weight(name).detach() for n, m in layers.items()}


@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
@pytest.mark.parametrize("configs", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
def test_the_changes_are_those_of_pefts_own_combination(tmp_path, kind, configs):
    folders = _made(tmp_path, configs)
    weights = {name: WEIGHTS[name] for name in configs}
    if kind == "linear" and configs is UNEQUAL:
        with pytest.raises(ModelError, match=r"export\.combination: linear adds matrices of one rank, but q_proj has"):
            combine_adapters(folders, weights, kind, tmp_path / "one")
        return
    done = combine_adapters(folders, weights, kind, tmp_path / "one")
    judge = stock(_Base(), {name: str(folder) for name, folder in folders.items()})
    judge.base_model.add_weighted_adapter(list(weights), list(weights.values()), "one", kind)
    mine: Any = PeftModel.from_pretrained(_Base(), str(tmp_path / "one"), "one")
    wanted, found = _changes(judge, "one"), _changes(mine, "one")
    assert wanted.keys() == found.keys() and done.modules == len(wanted)
    for name, change in wanted.items():
        torch.testing.assert_close(found[name], change, rtol=1e-4, atol=1e-6)
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(2))
    judge.set_adapter("one")
    torch.testing.assert_close(mine(x), judge(x), rtol=1e-4, atol=1e-5)
    if configs is EQUAL and kind != "svd":  # the very tensors, too; of an SVD, signs are free
        for name in found:
            ours, theirs = mine.get_submodule(name), judge.get_submodule(name)
            torch.testing.assert_close(ours.lora_A["one"].weight, theirs.lora_A["one"].weight)
    total: dict[str, Any] = {}
    for name, weight in weights.items():
        for module, change in _changes(judge, name).items():
            total[module] = total.get(module, 0) + weight * change
    off = sum(float((found[n] - change).square().sum()) for n, change in total.items())
    size = sum(float(change.square().sum()) for change in total.values())
    assert done.difference == pytest.approx((off / size) ** 0.5, abs=1e-5)
    assert (done.difference < 1e-5) == (kind == "cat")
    assert read_adapter_config(tmp_path / "one").settings(stored_modules(tmp_path / "one")).method == "lora"


def test_the_scaling_of_rslora_is_taken_as_it_is(tmp_path):
    """PEFT's own combination keeps ``use_rslora`` of the first adapter, and scales the result by it once more."""
    rslora = {"a": lambda: peft.LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj"])}
    folders = _made(tmp_path, EQUAL | rslora)
    combine_adapters(folders, {"a": 2.0, "b": 1.0}, "cat", tmp_path / "one")
    judge = stock(_Base(), {name: str(folder) for name, folder in folders.items()})
    mine: Any = PeftModel.from_pretrained(_Base(), str(tmp_path / "one"), "one")
    changes = [_changes(judge, name)["base_model.model.q_proj"] for name in ("a", "b")]
    found = _changes(mine, "one")["base_model.model.q_proj"]
    torch.testing.assert_close(found, 2 * changes[0] + changes[1], rtol=1e-4, atol=1e-6)


def test_a_rank_can_be_chosen_and_is_the_best_of_that_rank():
    generator = torch.Generator().manual_seed(5)
    down, up = torch.randn(6, 20, generator=generator), torch.randn(30, 6, generator=generator)
    parts = [Weighted(down[:4], up[:, :4], 0.5), Weighted(down[4:], up[:, 4:], -2.0)]
    whole = sum(part.weight * part.up @ part.down for part in parts)
    u, s, vh = torch.linalg.svd(whole, full_matrices=False)
    made = combine(parts, "svd", 3)
    assert (made[0].shape, made[1].shape) == ((3, 20), (30, 3))
    torch.testing.assert_close(made[1] @ made[0], u[:, :3] * s[:3] @ vh[:3], rtol=1e-4, atol=1e-4)
    size, off = squares(parts, made)
    assert size == pytest.approx(float(whole.square().sum()), rel=1e-5)
    assert off == pytest.approx(float(s[3:].square().sum()), rel=1e-4)


def _asked(folders: dict[str, str], **export: Any) -> Any:
    values = {"adapter": folders, "export": {"weights": dict.fromkeys(folders, 1.0), "to": "x", **export}}
    return from_dict(values)


def test_on_the_command_line(tmp_path, capsys):
    folders = {name: str(folder) for name, folder in _made(tmp_path, UNEQUAL).items()}
    assert run(check_verb("export", _asked(folders, to=str(tmp_path / "one"), rank=2))) == 0
    assert "1 x a + 1 x b + 1 x c -> " in (said := capsys.readouterr().out) and "svd: differs from that sum" in said
    config = json.loads((tmp_path / "one/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (2, 2, False)
    assert all(2 in tensor.shape for tensor in load_file(tmp_path / "one/adapter_model.safetensors").values())


@pytest.mark.parametrize(
    ("export", "said"),
    [
        ({"weights": {"a": 1.0}}, "export.weights: needs one for each of a, b, got a."),
        ({"to": None}, "export.to: not set."),
        ({"combination": "cat", "rank": 3}, "export.rank: export.combination=cat has no choice of ranks"),
        ({"plain_lora": True}, "adapter: several become one with what=adapter"),
        ({"weights": {"a": 1.0, "b": float("nan")}}, "export.weights: must be finite numbers"),
    ],
)
def test_what_is_missing_is_said(export, said):
    with pytest.raises(ConfigError, match=said.replace(".", r"\.")):
        check_verb("export", _asked({"a": "x", "b": "y"}, **export))


def test_what_cannot_be_combined_is_refused_by_name(tmp_path):
    others = {
        "dora": lambda: peft.LoraConfig(use_dora=True, target_modules=["q_proj"]),
        "ia3": lambda: peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    }
    folders = _made(tmp_path, EQUAL | others)
    for name in others:
        with pytest.raises(ModelError, match=f"adapter: {name} is {name}; only adapters of lora and rslora can be"):
            combine_adapters({"a": folders["a"], name: folders[name]}, {"a": 1, name: 1}, "cat", tmp_path / "one")
    file = folders["b"] / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "other/base"}))
    with pytest.raises(ModelError, match="adapter: a is for None, and b for other/base; only adapters of one base"):
        combine_adapters({n: folders[n] for n in "ab"}, {"a": 1, "b": 1}, "cat", tmp_path / "one")
    assert not (tmp_path / "one").exists() and BASE not in folders
