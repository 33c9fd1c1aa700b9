"""A model whose norms, products and loss other kernels compute trains like upstream's modules, whatever the widths."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from fsdp_qlora.errors import ConfigError
from fsdp_qlora.files.home import COMPILED_PLACES
from fsdp_qlora.heads.upstream import after_head
from fsdp_qlora.model.fused import fusible, swap_fused
from fsdp_qlora.model.kernels import CompiledKernels, Kernels, LigerKernels
from fsdp_qlora.model.root import CausalModel, install_loss_head
from fsdp_qlora.parallel.compile import CompiledRegion
from fsdp_qlora.parallel.recompute import checkpoint_activations
from tests.families import write_family
from tests.unit.test_compile import _fill, _model
from tests.unit.test_kernels import stand_in  # noqa: F401 - a fixture

WIDTHS = (40, 7, 56, 33, 64, 12, 2, 48, 21, 63)
MOST_GRAPHS = 7
"""Of two widths (hidden and a head's), with and without a gradient of the input; and the product and the loss."""


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """Keep compiled code in this test's folder, and use one thread: many small operations wait for each other's."""
    for variable, name in COMPILED_PLACES.items():
        monkeypatch.setenv(variable, str(tmp_path / name))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _run(model: CausalModel, length: int, rows: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return a micro-batch's losses and the adapters' gradients."""
    ids = torch.arange(rows * length).mul(7).remainder(200).view(rows, length)
    model.train()
    losses = model(ids, ids)
    losses.sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = [parameter.grad.clone() for parameter in trained]
    model.zero_grad()
    return losses.detach(), gradients


def _built(folder, kernels: Kernels, checkpointing: str) -> CausalModel:
    peft, base, _ = _model(folder)
    model = CausalModel(peft)
    after = after_head(base)
    kernels.begin()
    swap_fused(base, fusible(base, kernels, torch.float32))
    install_loss_head(base, after, 16, kernels.cross_entropy)
    if checkpointing != "none":
        checkpoint_activations(base, checkpointing)
    _fill(peft, base)
    return model


def _compare(folder, kernels: Kernels, checkpointing: str = "none", widths: tuple[int, ...] = WIDTHS) -> None:
    plain, fused = (_built(folder, each, checkpointing) for each in (Kernels(), kernels))
    counters.clear()
    for number, length in enumerate(widths):
        rows = 2 if number % 3 else 1
        (wanted, wanted_gradients), (losses, gradients) = (_run(model, length, rows) for model in (plain, fused))
        torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=1e-6)
        whole = torch.cat([each.flatten() for each in wanted_gradients]).norm()
        for mine, theirs in zip(gradients, wanted_gradients, strict=True):
            assert (mine - theirs).norm() <= 3e-4 * max(theirs.norm(), 0.01 * whole)
    with torch.no_grad():
        ids = torch.arange(50)[None]
        before = counters["stats"]["unique_graphs"]
        assert fused.logits(ids).equal(plain.logits(ids)) or isinstance(kernels, LigerKernels)
        assert counters["stats"]["unique_graphs"] == before  # evaluation takes no compilation


@pytest.mark.full
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gemma2"])
def test_compiled_kernels_hold_over_widths(family, tmp_path):
    _compare(write_family(tmp_path / "model", family), CompiledKernels())
    assert 1 <= counters["stats"]["unique_graphs"] <= MOST_GRAPHS


@pytest.mark.full
def test_a_region_that_cannot_be_compiled_is_an_error():
    def breaks(x: torch.Tensor) -> torch.Tensor:
        return x + x.sum().item() if x.sum().item() > 0 else x

    with pytest.raises(ConfigError, match=r"train\.kernels: cannot be compiled here .*Set it to torch") as refused:
        CompiledRegion(breaks)(torch.ones(3, 4))
    assert refused.value.exit_code == 2


@pytest.mark.full
@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_compiled_kernels_are_recomputed(tiny_model, checkpointing):
    _compare(tiny_model, CompiledKernels(), checkpointing)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_stand_in_for_liger_trains_the_same(family, checkpointing, tmp_path):
    """It overwrites what Liger's kernels overwrite in backward. Its norms and products; the loss is ours."""

    class Modules(LigerKernels):
        cross_entropy = Kernels.cross_entropy

    _compare(write_family(tmp_path / "model", family), Modules(), checkpointing, WIDTHS[:2])
