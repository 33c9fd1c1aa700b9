"""The share of the possible: real tokens only, known devices only."""

from __future__ import annotations

import pytest

from fsdp_qlora.config.rules import failures
from fsdp_qlora.config.schema import from_dict
from fsdp_qlora.model.skeleton import read_shapes
from fsdp_qlora.plan.devices import DEVICES, DRIVER_NAMES, device_of_driver
from fsdp_qlora.plan.timing import flops_per_token, model_flops
from fsdp_qlora.profile.roofline import GemmTimes, mfu
from fsdp_qlora.run.decide import plan_for, planned_skeleton
from fsdp_qlora.track.meter import Meter, Window


def _planned(model: str, length: int, checkpointing: str = "none"):
    config = from_dict(
        {
            "model": {"name": model},
            "data": {"max_length": length},
            "train": {"activation_checkpointing": checkpointing},
        }
    )
    resolved, base = planned_skeleton(config)
    return plan_for(resolved, 2), read_shapes(base)


def test_operations_of_real_tokens_by_hand():
    plan, shapes = _planned("HuggingFaceTB/SmolLM2-135M", 2048)
    token = flops_per_token(plan, shapes)
    attention = token.forward - 2 * (106_168_320 + 49152 * 576 + plan.trainable_parameters)
    # full rows, all of it learned: forward and backward, but for the half S that flash attention computes again
    assert model_flops(plan, shapes, 4096, 4096, 2) == pytest.approx(
        4096 * (token.forward + token.backward - 0.5 * attention)
    )
    # half as long: attention is half as much a token; nothing learned: no head
    less = model_flops(plan, shapes, 2048, 0, 2)
    assert less == pytest.approx(2048 * (4 * 106_168_320 + 6 * plan.trainable_parameters + 3 * attention / 2))


def test_what_is_computed_again_does_not_count():
    kept, shapes = _planned("HuggingFaceTB/SmolLM2-135M", 512)
    again, _ = _planned("HuggingFaceTB/SmolLM2-135M", 512, "full")
    assert flops_per_token(again, shapes).recompute > 0
    assert model_flops(kept, shapes, 700, 600, 3) == model_flops(again, shapes, 700, 600, 3)


def test_a_device_is_known_by_its_exact_name_or_not_at_all():
    assert set(DRIVER_NAMES.values()) == set(DEVICES)
    assert device_of_driver("NVIDIA GeForce RTX 4090") is DEVICES["rtx4090"]
    assert device_of_driver("NVIDIA A100-SXM4-80GB") is DEVICES["a100_80"]
    for other in (
        "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "NVIDIA H100 PCIe", "NVIDIA H100 NVL",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA L40", "Tesla T4", "",
    ):  # fmt: skip
        assert device_of_driver(other) is None, other


def test_mfu_is_of_all_ranks():
    plan, shapes = _planned("HuggingFaceTB/SmolLM2-135M", 512)
    window = Window(steps=2, seconds=0.5, tokens=9000, target_tokens=4000, rows=20)
    peak = DEVICES["rtx4090"].teraflops * 1e12
    (value,) = mfu(plan, shapes, DEVICES["rtx4090"], 2, window).values()
    assert value == pytest.approx(model_flops(plan, shapes, 9000, 4000, 20) / (0.5 * peak * 2))


def test_the_share_of_products_alone():
    times = GemmTimes(token_seconds=1e-3, target_seconds=5e-4, teraflops=0.1, micro_batch_tokens=100)
    window = Window(steps=1, seconds=4.0, tokens=2000, target_tokens=1000, rows=10)
    assert times.share(2, window) == {"roofline_share": pytest.approx((2.0 + 0.5) / 2 / 4)}


def test_the_meter_says_what_was_reached_of_each_window():
    seen: list[Window] = []
    meter = Meter(lambda window: seen.append(window) or {"mfu": 0.4})
    for tokens in (10, 20):
        with meter.waiting():
            pass
        with meter.step():
            pass
        meter.count(tokens, tokens // 2, 2)
    values = meter.read()
    assert values["mfu"] == 0.4 and values["tokens_per_second"] == pytest.approx(30 / seen[0].seconds)
    assert (seen[0].steps, seen[0].tokens, seen[0].target_tokens, seen[0].rows) == (2, 30, 15, 4)
    assert "mfu" not in meter.read()  # nothing since
    assert Meter().read().keys() == {"tokens_per_second", "step_seconds"}


def test_a_profile_needs_a_step_to_record():
    def problems(steps: int, **debug) -> list[str]:
        values = {"train": {"max_steps": steps}, "debug": {"name": "profile", **debug}}
        return [p for p in failures(from_dict(values)) if p.startswith("debug.")]

    assert problems(3) == problems(0) == []
    assert len(problems(2)) == 1 and len(problems(5, record_steps=0)) == 1 and len(problems(5, warmup_steps=-1)) == 1
