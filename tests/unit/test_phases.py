"""Whose time it is: every nanosecond of a step goes to one phase, and once."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn
from torch.profiler import profile, record_function
from torch.utils.checkpoint import checkpoint

from fsdp_qlora import scopes
from fsdp_qlora.cli.show import print_profile
from fsdp_qlora.profile.modules import record_modules
from fsdp_qlora.profile.phases import PHASES, divide_steps
from fsdp_qlora.profile.trace import Event, Trace, read_trace

MAIN, GLOO = 1, 2


def _divide(*host, device=(), launches=(), forward_of=None):
    events = [Event(name, thread, start, end) for name, thread, start, end in host]
    trace = Trace(events, list(launches), list(device), forward_of or {})
    steps = divide_steps(trace)
    assert steps
    for step in steps:
        assert sum(step.phases.values()) == step.total and list(step.phases) == list(PHASES)
        assert all(value >= 0 for value in step.phases.values()) and 0 <= step.waited <= step.phases["waiting"]
    return steps


def _phases(*host, **more):
    (step,) = _divide((scopes.STEP, MAIN, 0, 1000), *[(name, MAIN, a, b) for name, a, b in host], **more)
    return {phase: value for phase, value in step.phases.items() if value}


def test_nested_events_are_counted_once():
    found = _phases(
        ("aten::linear", 100, 300), ("aten::t", 110, 120), ("aten::addmm", 120, 290), ("aten::silu", 300, 350)
    )
    assert found == {"gemm": 200, "elementwise": 50, "waiting": 750}


def test_any_nesting_adds_up_to_the_step():
    draw = random.Random(0)
    names = ["aten::mm", "aten::mul", "FSDP::pre_forward", "x", scopes.DATA, "bitsandbytes::dequantize_4bit", "aten::t"]
    names += ["Optimizer.step#AdamW", "autograd::engine::evaluate_function: MmBackward0", "FSDP::all_gather (layer)"]

    def nest(start: int, end: int, depth: int):
        while start < end and depth < 6:
            first = draw.randint(start, end)
            last = draw.randint(first, end)
            yield (draw.choice(names), MAIN, first, last)
            yield from nest(first, last, depth + 1)
            start = last + draw.randint(0, 3)

    for _ in range(50):
        events = [(scopes.STEP, MAIN, 10, 990), *nest(0, 1000, 0)]
        _divide(*events, ("gloo:all_gather", GLOO, 5, draw.randint(6, 2000)))


def test_what_is_rounded_beyond_its_parent_is_cut():
    assert _phases(("aten::linear", 100, 200), ("aten::mm", 150, 201), ("aten::mul", 201, 202)) == {
        "gemm": 100, "elementwise": 1, "waiting": 899,
    }  # fmt: skip


def test_an_operator_of_ours_goes_by_what_is_inside_it():
    found = _phases(
        ("fsdp_qlora::qlora_linear", 0, 100), ("bitsandbytes::dequantize_4bit", 10, 30), ("aten::empty", 12, 14),
        ("aten::mm", 30, 80), ("aten::mul", 80, 95),
        ("fsdp_qlora::causal_attention", 200, 300), ("aten::bmm", 210, 240), ("aten::exp", 240, 280),
        ("fsdp_qlora::chunked_cross_entropy", 400, 500), ("aten::mm", 410, 450), ("aten::logsumexp", 450, 490),
    )  # fmt: skip
    assert found == {
        "gemm": 65, "dequantize": 20, "elementwise": 15, "attention": 100, "head": 100, "waiting": 700,
    }  # fmt: skip


def test_in_an_attention_module_projections_stay_matrix_products():
    found = _phases(
        (scopes.ATTENTION_BLOCK, 0, 300), ("aten::mm", 0, 50), ("aten::matmul", 50, 110), ("aten::bmm", 60, 110),
        ("aten::_softmax", 110, 130), ("aten::mul", 130, 140), ("aten::bmm", 300, 400),
    )  # fmt: skip
    assert found == {"gemm": 160, "attention": 70, "elementwise": 10, "waiting": 760}


@pytest.mark.parametrize("scope", ["DATA", "OPTIMIZER", "HEAD", "ATTENTION", "DEQUANTIZE", "GATHER"])
def test_a_scope_claims_what_is_inside(scope):
    found = _phases((getattr(scopes, scope), 100, 200), ("aten::mm", 110, 150), ("aten::mul", 150, 160))
    assert found == {scope.lower(): 100, "waiting": 900}


def test_backward_is_what_its_forward_was():
    engine = "autograd::engine::evaluate_function: "
    found = _phases(
        (scopes.HEAD, 0, 100), ("_Loss", 10, 90), ("aten::mm", 20, 80),
        (scopes.ATTENTION_BLOCK, 100, 200), ("aten::bmm", 110, 150), ("aten::mul", 150, 160),
        (f"{engine}_LossBackward", 500, 600), ("_LossBackward", 510, 590), ("aten::mul", 520, 580),
        (f"{engine}BmmBackward0", 600, 700), ("BmmBackward0", 610, 690), ("aten::bmm", 620, 680),
        (f"{engine}ScaledDotProductFlashAttentionBackward0", 700, 800), ("aten::mul", 750, 790),
        forward_of={(MAIN, 510): (MAIN, 10), (MAIN, 610): (MAIN, 110)},
    )  # fmt: skip
    assert found == {"head": 180, "attention": 120, "elementwise": 50, "waiting": 650}


def test_a_gather_during_backward_is_a_gather():
    found = _phases(
        ("SoftmaxBackward0", 0, 100), ("FSDP::pre_backward (layers.1)", 20, 60), ("FSDP::all_gather (layers.1)", 20, 50),
        ("fsdp::all_gather_copy_in", 20, 25), ("c10d::_allgather_base_", 25, 30),
    )  # fmt: skip
    assert found == {"gather": 20, "waiting": 980}


def test_waiting_in_collectives_is_told_apart():
    (step,) = _divide(
        (scopes.STEP, MAIN, 0, 1000), ("FSDP::all_gather (layer)", MAIN, 100, 300), ("c10d::x", MAIN, 100, 120),
        ("aten::mm", MAIN, 300, 400), ("gloo:all_gather", GLOO, 110, 250), ("gloo:all_gather", GLOO, 240, 310),
        ("aten::copy_", GLOO, 120, 140),
    )  # fmt: skip
    assert step.phases["gather"] == 20 and step.phases["gemm"] == 100 and step.phases["waiting"] == 880
    assert step.waited == 180 and step.under_way == 200


def test_each_step_has_its_own_time():
    steps = _divide(
        (scopes.STEP, MAIN, 0, 100), ("aten::mm", MAIN, 10, 30), ("aten::mm", MAIN, 110, 150),
        (scopes.STEP, MAIN, 200, 400), ("aten::mul", MAIN, 200, 400),
    )  # fmt: skip
    assert [step.total for step in steps] == [100, 200]
    assert steps[0].phases["gemm"] == 20 and steps[1].phases["elementwise"] == 200


def test_on_a_device_the_computing_stream_counts():
    backward = 7  # autograd's own thread
    host = [
        (scopes.DATA, MAIN, 0, 100), ("aten::mm", MAIN, 100, 120), ("aten::bmm", backward, 120, 140),
        (scopes.OPTIMIZER, MAIN, 900, 950), ("mystery", MAIN, 950, 960),
    ]  # fmt: skip
    launches = [
        Event("cudaLaunchKernel", MAIN, 110, 112, 1), Event("cudaLaunchKernel", backward, 130, 132, 2),
        Event("cudaLaunchKernel", MAIN, 955, 956, 4),
    ]  # fmt: skip
    device = [
        Event("sm90_gemm", 7, 50, 60, None),  # of the step before; known by its name
        Event("sm90_something", 7, 150, 400, 1),
        Event("other", 7, 400, 500, 2),
        Event("ncclDevKernel_AllGather", 20, 300, 700, 3),
        Event("vectorized", 7, 960, 970, 4),
    ]
    (step,) = _divide((scopes.STEP, MAIN, 0, 1000), *host, device=device, launches=launches)
    assert {k: v for k, v in step.phases.items() if v} == {
        "gemm": 10 + 250 + 100, "data": 90, "elementwise": 10, "optimizer": 50, "waiting": 490,
    }  # fmt: skip
    assert step.waited == 200 and step.under_way == 400


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, *grads):
        return torch.sin(grads[0])


class _Head(nn.Module):
    def forward(self, x):
        return _Double.apply(x)


class ToyAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(32, 32)

    def forward(self, x):
        q = self.q(x)
        return torch.softmax(q @ q.transpose(1, 2), dim=-1) @ q


def test_a_real_trace_is_understood(tmp_path):
    torch.manual_seed(0)
    attention, head, x = ToyAttention(), _Head(), torch.randn(4, 256, 32)

    def step():
        with record_function(scopes.STEP):
            hidden = checkpoint(lambda y: attention(y) * 3, x, use_reentrant=False)
            assert isinstance(hidden, torch.Tensor)
            head(hidden).sum().backward()

    modules = [(attention, scopes.ATTENTION_BLOCK), (head, scopes.HEAD)]
    step()
    with record_modules(modules), profile() as found:
        step()
    assert not attention._forward_hooks and not head._forward_pre_hooks
    found.export_chrome_trace(str(tmp_path / "trace.json.gz"))
    trace = read_trace(tmp_path / "trace.json.gz")
    assert trace.forward_of
    (measured,) = divide_steps(trace)
    assert sum(measured.phases.values()) == measured.total
    assert all(measured.phases[phase] for phase in ("attention", "gemm", "head", "elementwise"))
    assert not any(measured.phases[phase] for phase in ("gather", "dequantize", "optimizer", "data"))
    # the head's backward (a sine) is the head's, though no scope is around it
    events = {e.name: e for e in trace.host}
    sine, backward = events["aten::sin"], events["_DoubleBackward"]
    assert backward.start <= sine.start and measured.phases["head"] >= sine.end - sine.start


def test_the_table_shows_rank_0_and_the_one_that_waits_least(capsys):
    def rank(number: int, waiting: float):
        phases = dict.fromkeys(PHASES, 0.1) | {"waiting": waiting}
        return {
            "rank": number, "steps": [3, 4], "step_seconds": sum(phases.values()), "phases": phases,
            "waiting": {"in_collectives": 0.05, "elsewhere": 0.05}, "trace": f"rank{number}.json.gz",
        }  # fmt: skip

    print_profile({"ranks": [rank(0, 0.2), rank(3, 0.1)], "slowest_rank": 3, "folder": "outputs/x/profile"})
    out = capsys.readouterr().out
    assert all(phase in out for phase in [*PHASES, "step", "rank 0", "rank 3 (waits least", "rank3.json.gz"])
    assert "0.2000  20.0 %" in out and "1.0000 100.0 %" in out
