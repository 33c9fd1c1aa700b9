"""Offload: copies wait for each other as they must, what stays stays, and the plan counts it."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fsdp_qlora.cli.compose import compose_config
from fsdp_qlora.errors import ConfigError, NumericsError
from fsdp_qlora.load.stream import allocate
from fsdp_qlora.parallel.offload import HostActivations, _Kept, offload_activations
from fsdp_qlora.plan.plan import make_plan
from fsdp_qlora.shapes.linears import LinearShape, ModelShapes


class LateCopies:
    """A device whose side stream does nothing until somebody waits for it: a wait that is missing gives wrong numbers."""

    def __init__(self) -> None:
        self.queue: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.done = 0
        self.compute, self.side = LateStream(self), LateStream(self)

    def current_stream(self) -> LateStream:
        return self.compute

    @contextlib.contextmanager
    def stream(self, _):
        with _Late(self):
            yield

    def pending(self, tensor: torch.Tensor) -> bool:
        return any(tensor is target for target, _ in self.queue)

    def run_until(self, number: int) -> None:
        while self.done < number:
            target, source = self.queue.pop(0)
            target.copy_(source)
            self.done += 1


class LateStream:
    def __init__(self, lane: LateCopies) -> None:
        self.lane = lane

    def wait_stream(self, other: LateStream) -> None:
        assert other is self.lane.compute

    def record_event(self) -> int:
        return self.lane.done + len(self.lane.queue)

    def wait_event(self, event: int) -> None:
        assert self is self.lane.compute
        self.lane.run_until(event)


class _Late(TorchDispatchMode):
    def __init__(self, lane: LateCopies) -> None:
        super().__init__()
        self.lane = lane

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is torch.ops.aten.copy_.default
        args[0].fill_(float("nan"))
        self.lane.queue.append((args[0], args[1]))
        return args[0]


class Layer(nn.Module):
    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)
        self.checkpointed = checkpointed

    def inner(self, x, table):
        return x + self.down(torch.tanh(self.up(x * table)))

    def forward(self, x, table):
        return checkpoint(self.inner, x, table, use_reentrant=False) if self.checkpointed else self.inner(x, table)


def _gradients(layers, moved_by=None):
    torch.manual_seed(1)
    x, table = torch.randn(4, 8), torch.randn(8)
    for _ in range(2):  # two forwards, then their backwards: as with two losses
        total = torch.zeros(())
        for turn in range(2):
            hidden = (x + turn).requires_grad_()
            for layer in layers:
                hidden = layer(hidden, table)
            total = total + hidden.square().sum()
        total.backward()
    return [p.grad.clone() for layer in layers for p in layer.parameters()]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_nothing_is_used_or_freed_before_its_copy_is_done(monkeypatch, checkpointed):
    torch.manual_seed(0)
    layers = [Layer(checkpointed) for _ in range(6)]
    wanted = _gradients(layers)
    for layer in layers:
        layer.zero_grad()
    lane, freed = LateCopies(), []
    moved = HostActivations(torch.device("cpu"), min_bytes=1)
    moved._lane, moved._side = lane, lane.side
    for layer in layers:
        moved.watch(layer)
    let_go = _Kept.let_go

    def careful(kept):
        assert not lane.pending(kept.host), "let go before it was copied"
        freed.append(kept)
        let_go(kept)

    monkeypatch.setattr(_Kept, "let_go", careful)
    found = _gradients(layers)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert freed
    assert 0 < moved.bytes_back < moved.bytes_out
    with torch.no_grad():
        before = moved.bytes_out
        layers[0](torch.randn(4, 8), torch.randn(8))
        assert moved.bytes_out == before


def _saved_in(layer, *args, min_bytes=0, **kwargs):
    """Return (tensor, whether it was moved) of all that autograd saves in one forward of ``layer``."""
    moved, seen = offload_activations([layer], torch.device("cpu"), min_bytes), []
    pack = moved._hooks.pack_hook

    def look(tensor):
        packed = pack(tensor)
        seen.append((tensor, isinstance(packed, _Kept)))
        return packed

    moved._hooks.pack_hook = look
    layer(*args, **kwargs).sum().backward()
    return seen


def test_parameters_shared_and_small_tensors_stay():
    layer, x, table = Layer(False), torch.randn(4, 8).requires_grad_(), torch.randn(8)
    storages = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), table)}
    seen = _saved_in(layer, x, table=table)
    stayed = [t for t, moved in seen if not moved]
    assert stayed
    assert all(t.untyped_storage().data_ptr() in storages for t in stayed)
    assert sum(moved for _, moved in seen) >= 2
    seen = _saved_in(Layer(False), x, table, min_bytes=4 * 32 * 4)
    assert {tuple(t.shape) for t, moved in seen if moved} == {(4, 32)}


def test_a_layer_that_fails_leaves_no_hooks():
    layer = Layer(False)
    moved = offload_activations([layer], torch.device("cpu"))
    with pytest.raises(RuntimeError, match="size of tensor"):
        layer(torch.randn(4, 9), torch.randn(8))
    out = moved.bytes_out
    torch.randn(3, requires_grad=True).exp().sum().backward()
    assert moved.bytes_out == out


def test_a_write_into_a_saved_tensor_is_an_error():
    class Careless(Layer):
        def inner(self, x, table):
            middle = x * 2
            out = middle * self.up.weight.sum()
            middle.add_(1)
            return out

    layer = Careless(False)
    offload_activations([layer], torch.device("cpu"))
    out = layer(torch.randn(4, 8).requires_grad_(), torch.randn(8))
    with pytest.raises(NumericsError, match="in place"):
        out.sum().backward()


def test_shards_and_buffers_are_allocated_where_they_are_used():
    model = nn.Sequential(nn.Linear(2, 2, device="meta"), nn.BatchNorm1d(2, device="meta"))
    model.register_buffer("table", torch.empty(3, device="meta"), persistent=False)
    allocate(model, torch.device("cpu"), torch.device("meta"), ())
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert {b.device.type for b in model.buffers()} == {"meta"}
    assert "table" not in model.state_dict() and "1.running_mean" in model.state_dict()


SHAPES = ModelShapes(
    parameters={"embed.weight": (256, 128), **{f"layers.{i}.up.weight": (512, 128) for i in range(4)}},
    linears=tuple(LinearShape(f"layers.{i}.up", 512, 128) for i in range(4)),
    layers=tuple(f"layers.{i}" for i in range(4)), embedding="embed", head="embed", tied=True, hidden_size=128,
    vocab_size=256, num_attention_heads=4,
)  # fmt: skip


def _plan(*overrides):
    return make_plan(compose_config("plan", ["model.name=x", *overrides]), SHAPES, 2)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_the_plan_counts_host_memory_apart(checkpointing):
    common = [f"train.activation_checkpointing={checkpointing}"]
    plain = _plan(*common)
    assert plain.host.offloaded_parameters == plain.host.offloaded_activations == 0
    parameters = _plan(*common, "fsdp.offload=params")
    base = plain.bytes
    assert parameters.bytes.base_packed == parameters.bytes.optimizer == 0
    fixed = base.base_packed + base.base_statistics + base.base_kept + base.adapters + base.optimizer
    assert parameters.host.offloaded_parameters == fixed + 2 * base.adapters  # gradients, and roots of second moments
    activations = _plan(*common, "fsdp.offload=activations")
    assert activations.bytes.activations < base.activations
    assert activations.host.offloaded_activations > 0
    both = _plan(*common, "fsdp.offload=all")
    moved = activations.host.offloaded_activations
    assert both.host.offloaded_parameters == fixed + max(0, 2 * base.adapters - moved)
    assert both.host.offloaded_activations == activations.host.offloaded_activations
    assert both.peak <= min(parameters.peak, activations.peak) < plain.peak
    assert _plan(*common, "fsdp.prefetch=3").bytes.gather > base.gather


def test_settings_are_checked():
    with pytest.raises(ConfigError, match=r"fsdp\.prefetch: must not be negative"):
        compose_config("train", ["fsdp.prefetch=-1"])
    with pytest.raises(ConfigError, match=r"fsdp\.offload"):
        compose_config("train", ["fsdp.offload=disk"])
