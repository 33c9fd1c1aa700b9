"""What a vision tower takes for its images: the plan's bounds beside what upstream's code allocates and saves."""

from __future__ import annotations

import weakref
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

from fsdp_qlora.config.rules import failures
from fsdp_qlora.config.schema import from_dict
from fsdp_qlora.errors import PlanError
from fsdp_qlora.objectives.vision import family_of
from fsdp_qlora.plan.plan import TrainPlan
from fsdp_qlora.plan.storage import StorageSettings
from fsdp_qlora.run.decide import planned
from fsdp_qlora.run.images import images_of_rows
from fsdp_qlora.run.tokens import prepare_tokens
from tests.image_chats import VISION, write_conversations, write_image_chat_model
from tests.tiers import some_in_full
from tests.tiny import make_model

TRAINED = {
    "nothing of it": [],
    "all of it": ["{tower}.*"],
    "from its second block on": ["{tower}.*.1.*"],
}


class _Live(TorchDispatchMode):
    """Counts the bytes of tensors that exist, but for those of parameters and buffers."""

    def __init__(self, own: set[int]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._own, self._held = own, dict[int, Any]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(made) if isinstance(x, torch.Tensor)):
            if storage.data_ptr() not in self._own and id(storage) not in self._held:
                self.now += storage.nbytes()
                freed = partial(self._freed, id(storage), storage.nbytes())
                self._held[id(storage)] = weakref.ref(storage, freed)
        self.peak = max(self.peak, self.now)
        return made

    def _freed(self, key: int, size: int, _: Any) -> None:
        self.now -= size
        del self._held[key]


def _planned(folder: str, settings: dict[str, Any], dtype: torch.dtype, attention: str) -> TrainPlan:
    config = from_dict({
        "model": {"name": folder, "attn_implementation": attention}, "lora": settings, "quant": {"name": "none", "double_quant": False},
        "precision": {"name": "bf16" if dtype == torch.bfloat16 else "fp32"},
        "data": {"train": "rows.jsonl", "max_length": 256}, "train": {"micro_batch_size": 2},
    })  # fmt: skip
    return planned(config, 1)[2]


@pytest.mark.full
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("family", VISION)
def test_a_tower_takes_no_more_than_planned(tmp_path, family, trained):
    folder = str(write_image_chat_model(tmp_path, family))
    tower = "model.vision_tower" if family.startswith("llava") else "model.visual"
    patterns = [pattern.format(tower=tower) for pattern in TRAINED[trained]]
    for dtype in (torch.bfloat16, torch.float32):
        for attention in ("sdpa", "eager"):
            plan = _planned(folder, {"target_modules": ["q_proj", *patterns], "r": 4}, dtype, attention)
            names = [name for name in plan.targets if name.startswith(tower)]
            assert bool(names) == bool(patterns)
            model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
            model.requires_grad_(False).train()
            if names:
                model = get_peft_model(model, LoraConfig(r=4, target_modules=names)).get_base_model().to(dtype)
            drawn, lengths = family_of(model.config).drawn(2, torch.Generator().manual_seed(0))
            assert lengths[0] == lengths[1]
            peak, saved, again = _measured(model, drawn, bool(names))
            memory, settings = plan.memory.tower, _of_images(plan, lengths[0])
            assert memory.trained == bool(names)
            own = memory.pixels(settings) + memory.saved(settings)
            reads = own + memory.held(settings) + memory.in_forward(settings)
            assert 1 <= reads / peak < 2.2
            if names:
                back = own + memory.held(settings) + memory.in_backward(settings)
                assert 1 <= memory.saved(settings) / saved < (1.15 if "all" in trained else 1.45)
                assert 1 <= back / again < 2.2
            else:
                assert memory.saved(settings) == saved == 0


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("family", some_in_full(VISION, ["qwen2_vl"]))
def test_a_tower_computes_what_is_planned(tmp_path, family, trained):
    """Counted by torch in upstream's code, without the convolution that embeds patches, and what adapters add."""
    folder = str(write_image_chat_model(tmp_path, family))
    tower = "model.vision_tower" if family.startswith("llava") else "model.visual"
    patterns = [pattern.format(tower=tower) for pattern in TRAINED[trained]]
    plan = _planned(folder, {"target_modules": ["q_proj", *patterns], "r": 1}, torch.float32, "eager")
    names = [name for name in plan.targets if name.startswith(tower)]
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.requires_grad_(False).train()
    if names:
        model = get_peft_model(model, LoraConfig(r=1, target_modules=names)).get_base_model()
    drawn, lengths = family_of(model.config).drawn(2, torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        features = model.get_image_features(**drawn)
        if names:
            torch.cat(list(features.pooler_output)).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    counted = sum(count for op, count in counts.items() if "convolution" not in str(op))
    planned_ones = plan.memory.tower.operations(_of_images(plan, lengths[0]))
    # of these few blocks, the first trained one's input has no gradient, and LLaVA leaves out the last one's output
    assert 0.9 < planned_ones / counted < (1.6 if names else 1.1), (planned_ones, counts)


def _of_images(plan: TrainPlan, tokens: int) -> StorageSettings:
    """Return the settings of two rows with an image of so many tokens in each, and nothing else."""
    return replace(plan.settings, micro_batch_size=2, max_length=tokens)


def _measured(model: Any, drawn: dict[str, torch.Tensor], trained: bool) -> tuple[int, int, int]:
    """Return the peak bytes of reading two images, those saved for backward, and the peak of backward."""
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with _Live(own) as live, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        read = {**drawn, "pixel_values": drawn["pixel_values"].clone()}  # as a batch holds them
        features = model.get_image_features(**read | {"pixel_values": read["pixel_values"].to(model.dtype)})
        forward, live.peak = live.peak, 0
        if trained:
            torch.cat(list(features.pooler_output)).sum().backward()
    return forward, sum(saved.values()), live.peak


def _plan(folder: Any, world_size: int = 2, **groups: Any) -> TrainPlan:
    return planned(from_dict({"model": {"name": str(folder)}, "lora": {"r": 4}, **groups}), world_size)[2]


@pytest.mark.full
def test_a_plan_counts_the_images_of_a_row_and_the_gathered_tower(tmp_path):
    folder = write_image_chat_model(tmp_path / "qwen2_vl", "qwen2_vl")
    full, one = _plan(folder), _plan(folder, plan={"images_per_row": 1})
    assert "at most 2048 tokens" in str(full.choices["objective.images"])
    assert "at most 25 tokens" in str(one.choices["objective.images"])  # 40 * 40 pixels, 8 * 8 of them a token
    few, many = (_plan(folder, plan={"images_per_row": count}).moments["images"] for count in (1, 2))
    assert few < many < full.moments["images"] and one.moments["images"] == few
    assert "images_backward" not in one.moments
    trained = _plan(folder, lora={"r": 4, "target_modules": ["q_proj", "model.visual.*"]})
    assert trained.moments["images_backward"] > 0 and trained.bytes.activations > full.bytes.activations
    shapes = full.memory.shapes
    outside = {
        n: s
        for n, s in shapes.parameters.items()
        if "layers." not in n and "embed_tokens" not in n and "lm_head" not in n
    }
    assert full.memory.root.gathered == 2 * sum(map(prod, outside.values()))
    packed = _plan(folder, quant={"vision": "nf4"})
    assert packed.memory.root.gathered < 0.6 * full.memory.root.gathered
    assert {x.linear.name for x in packed.quantized} - {x.linear.name for x in full.quantized} == shapes.beside
    assert _plan(folder, world_size=1).moments["images"] < full.moments["images"]  # no buffer to receive in


@pytest.mark.full
def test_settings_of_a_tower_are_refused_where_there_is_none(tmp_path):
    folder = make_model(tmp_path / "text")
    for groups, words in (
        ({"quant": {"vision": "nf4"}}, "quant.vision: this model reads no images"),
        ({"plan": {"images_per_row": 2}}, "plan.images_per_row: a llama reads no images"),
    ):
        with pytest.raises(PlanError, match=words):
            _plan(folder, **groups)
    said = failures(from_dict({"model": {"name": "m"}, "quant": {"vision": "nf4"}, "objective": {"name": "seq2seq"}}))
    assert any("quant.vision: only a model of objective=sft that reads images" in line for line in said)


@pytest.mark.full
def test_stored_rows_say_how_many_tokens_of_images_they_have(tmp_path, monkeypatch):
    monkeypatch.setenv("FSDP_QLORA_CACHE", str(tmp_path / "cache"))
    folder = write_image_chat_model(tmp_path / "llava", "llava")
    file = write_conversations(tmp_path / "data", 6)
    config = from_dict({"model": {"name": str(folder)}, "data": {"train": str(file), "max_length": 256}})
    shapes = images_of_rows(_plan(folder).memory.shapes, prepare_tokens(config))
    assert shapes.tower is not None and shapes.tower.most_tokens == 2 * 16  # two images of 4 * 4 patches
    assert (shapes.tower.tokens(256), shapes.tower.patches(256)) == (32, 2 * 17)  # each with CLIP's class token
