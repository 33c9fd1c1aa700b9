"""On one rank an answer copies no weights: nothing is gathered for it, and what PEFT's layers need cast is cast once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.run.inference import load_for_inference
from tests.build import config_of, world_of
from tests.distributed.test_many_adapters import make_adapters
from tests.unit.test_norms import Ops

IDS = torch.randint(5, 100, (3, 12), generator=torch.Generator().manual_seed(3))
NEW_TOKENS = 5


class _Copied(Ops):
    """Counts what is copied into something, as gathered weights are, beside the operators."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func._schema.name in ("aten::copy_", "aten::split_with_sizes_copy"):
            self.bytes += out.nbytes if isinstance(out, torch.Tensor) else 0
        return out


def _generate(ranks: Ranks, folder: str, adapter: str | None) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    config = config_of(folder, quant={"name": "none", "double_quant": False}, model={"check": "off"})
    prepared = load_for_inference(config, Path(adapter) if adapter else None, world_of(ranks))
    settings: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    with torch.no_grad(), _Copied() as copied:
        out = prepared.model.generate(
            input_ids=IDS, attention_mask=torch.ones_like(IDS), pad_token_id=0, synced_gpus=False, **settings
        )  # fmt: skip
        logits = prepared.model.logits(IDS)
    layers = sum(p.nbytes for name, p in prepared.model.named_parameters() if ".layers." in name)
    return out, logits, copied.bytes, layers


@pytest.mark.full
@pytest.mark.parametrize("adapted", [True, False])
def test_no_weight_is_copied_for_a_token(pool, tmp_path, tiny_model, adapted):
    adapter = None
    base: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    if adapted:
        configs: Any = {"one": lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])}
        adapter = make_adapters(base, tmp_path / "adapters", configs)["one"]
    out, logits, copied, layers = pool.run(1, _generate, str(tiny_model), adapter)[0]
    assert copied < layers, "less than the decoder layers' weights once, in six forwards"
    if adapter is not None:
        base = PeftModel.from_pretrained(base, adapter, autocast_adapter_dtype=False)
    with torch.no_grad():
        wanted = base.eval()(input_ids=IDS).logits.float()
    assert out.shape == (3, 12 + NEW_TOKENS)
    assert (logits.float() - wanted).abs().max() < 0.05 * wanted.abs().max()
