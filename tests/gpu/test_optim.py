"""On a GPU: every optimizer does what it does on a CPU, and paged states are paged and go through a checkpoint's tensors.

FSDP_QLORA_TEST_DEVICE=cpu is a dry run of the same code, where nothing is paged.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fsdp_qlora.config import choices
from fsdp_qlora.config.schema import OptimSettings
from fsdp_qlora.optim.bnb import BlockwiseOptimizer
from fsdp_qlora.optim.optimizers import ShardedOptimizer
from fsdp_qlora.optim.sizes import state_bytes
from tests.gpu.test_gpu import _HERE, DEVICE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not _HERE, reason=f"torch finds no {DEVICE} device here")]

OPTIMIZERS = choices.OPTIMIZERS.shipped
SHAPES = {"x.a": (16, 4096), "x.b": (8192, 16), "x.small": (8, 100), "x.odd": (70, 67)}
"""``x.b`` is large enough to be paged; ``x.odd`` ends within a block."""


def _settings(name: str) -> OptimSettings:
    return OptimSettings(name=name, lr=1e-2, weight_decay=0.01)  # type: ignore[arg-type]


def _draw(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: 1e-2 * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def _start(name: str, device: str) -> tuple[dict[str, nn.Parameter], ShardedOptimizer]:
    parameters = {key: nn.Parameter(5 * value.to(device)) for key, value in _draw(0).items()}
    return parameters, ShardedOptimizer(parameters.items(), _settings(name))


def _advance(parameters: dict[str, nn.Parameter], optimizer: ShardedOptimizer, steps: range) -> None:
    for step in steps:
        for key, gradient in _draw(step).items():
            parameters[key].grad = gradient.to(parameters[key].device)
        optimizer.step(1e-2)


def _tolerance(name: str) -> float:
    """Codes of 8 bits may flip; bitsandbytes' own kernels divide and take roots approximately (1.3e-4 on an H100)."""
    return 0.02 if name.endswith("_8bit") else 1e-3 if name.startswith("paged_") else 1e-4


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_a_cpu(name):
    there, on_device = _start(name, DEVICE)
    here, on_cpu = _start(name, "cpu")
    _advance(there, on_device, range(1, 4))
    _advance(here, on_cpu, range(1, 4))
    for key, value in here.items():
        moved = (value - 5 * _draw(0)[key]).detach()
        apart = (there[key].cpu() - value).detach()
        assert float(apart.norm() / moved.norm()) < _tolerance(name), key
    assert on_device.state_bytes() == sum(state_bytes(_settings(name), key, shape) for key, shape in SHAPES.items())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_saved_state_goes_on_with_the_same_bits(name):
    parameters, optimizer = _start(name, DEVICE)
    _advance(parameters, optimizer, range(1, 4))
    saved = {key: tensor.clone() for key, tensor in optimizer.state_tensors().items()}
    again, other = _start(name, DEVICE)
    with torch.no_grad():
        for key, value in parameters.items():
            again[key].copy_(value)
    state = other.load_state(3, {key: tensor.shape for key, tensor in saved.items()})
    for key, tensor in state.state_tensors().items():
        tensor.copy_(saved[key])
    state.finish()
    _advance(parameters, optimizer, range(4, 6))
    _advance(again, other, range(4, 6))
    assert all(torch.equal(again[key], value) for key, value in parameters.items())


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name.startswith("paged_")])
def test_large_states_are_paged(name):
    _, optimizer = _start(name, DEVICE)
    optimizer.prepare_state(1)
    inner = optimizer.inner
    assert isinstance(inner, BlockwiseOptimizer)
    paged = [getattr(state["state1"], "is_paged", False) for state in inner.state.values()]
    assert paged == [key == "x.b" and DEVICE != "cpu" for key in SHAPES]
    assert (optimizer.notice is None) == (DEVICE != "cpu")
