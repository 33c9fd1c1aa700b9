"""What a vision tower takes for its images: the plan's bounds beside what upstream's code allocates and saves."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForImageTextToText

from fsdp_qlora.config.schema import from_dict
from fsdp_qlora.errors import PlanError
from fsdp_qlora.objectives.vision import family_of
from fsdp_qlora.plan.plan import TrainPlan
from fsdp_qlora.plan.storage import StorageSettings
from fsdp_qlora.run.decide import planned
from tests.image_chats import VISION, write_image_chat_model

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
                self.now += (size := storage.nbytes())
                self._held[id(storage)] = weakref.ref(storage, lambda _, k=id(storage), n=size: self._freed(k, n))
        self.peak = max(self.peak, self.now)
        return made

    def _freed(self, key: int, size: int) -> None:
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
            reads = memory.held(settings) + memory.saved(settings) + memory.in_forward(settings)
            assert 1 <= reads / peak < 2
            if names:
                back = memory.held(settings) + memory.saved(settings) + memory.in_backward(settings)
                assert 1 <= memory.saved(settings) / saved < (1.15 if "all" in trained else 1.45)
                assert 1 <= back / again < 2.2
            else:
                assert memory.saved(settings) == saved == 0


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
