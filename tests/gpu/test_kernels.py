"""On a GPU: Liger's kernels and compiled regions compute what upstream's modules compute (`train.kernels`).

FSDP_QLORA_TEST_DEVICE=cpu is a dry run of the same code, with our own functions in place of Liger's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch

from fsdp_qlora.checks.verdict import Verdict
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.heads.logprobs import cross_entropy_
from fsdp_qlora.model import liger
from fsdp_qlora.model.formulas import Formula, gelu_tanh_product, silu_product
from fsdp_qlora.model.kernels import CompiledKernels, LigerKernels
from fsdp_qlora.run.check import check_model
from tests import upstream
from tests.gpu.test_gpu import _HERE, DEVICE, world
from tests.gpu.test_twin import _settings
from tests.matrix import small_config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not _HERE, reason=f"torch finds no {DEVICE} device here")]

WHERE = torch.device(DEVICE)
DRY = DEVICE == "cpu"
CODE = {formula: formula for formula in liger.CODE} if DRY else liger.CODE
LOSS = cross_entropy_ if DRY else liger.cross_entropy_
NO_LIGER = None if DRY else LigerKernels().refusal(WHERE)
NO_COMPILER = CompiledKernels().refusal(WHERE) if _HERE else ""
needs_liger = pytest.mark.skipif(NO_LIGER is not None, reason=str(NO_LIGER))
COMPILED = pytest.param("compile", marks=pytest.mark.skipif(NO_COMPILER is not None, reason=str(NO_COMPILER)))
KINDS = [COMPILED] if DRY else [pytest.param("liger", marks=needs_liger), COMPILED]
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "mixtral", "qwen3_moe")


def _near(mine: torch.Tensor, wanted: torch.Tensor) -> None:
    limit = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[wanted.dtype]
    assert mine.dtype == wanted.dtype
    mine, wanted = mine.detach(), wanted.detach()
    assert float((mine.float() - wanted.float()).norm()) <= limit * float(wanted.float().norm()) + 1e-6


@needs_liger
@pytest.mark.parametrize("width", [64, 128] if DEVICE == "cpu" else [64, 128, 576, 4096, 5120])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("formula", liger.CODE)
def test_ligers_kernels_compute_the_formulas(formula: Formula, dtype: torch.dtype, width: int) -> None:
    product = formula in (silu_product, gelu_tanh_product)
    for rows in (1, 37, 512 if width > 128 or DRY else 40_000):  # Liger takes other kernels for many narrow rows
        results = []
        for code in (formula, CODE[formula]):
            torch.manual_seed(0)
            x, y = (torch.randn(rows, width, device=WHERE).to(dtype).requires_grad_() for _ in range(2))
            weight = torch.randn(width, device=WHERE).to(dtype)
            # a sum with its own input, as a residual is: its gradient must not be overwritten
            out = code(x * 1, y * 1) if product else code(x, weight, 1e-5) + x
            out.float().square().mean().backward()
            results.append([out, *(each.grad for each in (x, y) if each.grad is not None)])
        for wanted, mine in zip(*results, strict=True):
            _near(mine, wanted)


@needs_liger
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 30.0), (2.0, 5.0)])
def test_ligers_loss_kernel_gives_our_losses_and_gradients(
    dtype: torch.dtype, scale: float, softcap: float | None
) -> None:
    for rows, vocab in ((256, 1000 if DRY else 128_256), (1, 49_152), (7, 1000)):
        torch.manual_seed(0)
        logits = (4 * torch.randn(rows, vocab, device=WHERE)).to(dtype)
        targets = torch.randint(0, vocab, (rows,), device=WHERE)
        for wants_grad in (True, False):
            mine, theirs = logits.clone(), logits.clone()
            wanted = cross_entropy_(mine, targets, scale, softcap, wants_grad)
            losses = LOSS(theirs, targets, scale, softcap, wants_grad)
            torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=1e-5)
            _near(theirs, mine)


@needs_liger
def test_a_step_does_not_wait_for_the_device() -> None:
    """The reason to launch the loss kernel ourselves: Liger's function reads three numbers from the device."""
    logits, targets = torch.randn(8, 1000, device=WHERE), torch.zeros(8, dtype=torch.long, device=WHERE)
    for waiting in (nullcontext, nullcontext if DRY else _no_waiting):  # the first time, kernels are compiled
        with waiting():
            LOSS(logits.clone(), targets, 1.0, None, True)
            for formula, code in CODE.items():
                x = torch.ones(8, 64, device=WHERE, requires_grad=True)
                product = formula in (silu_product, gelu_tanh_product)
                out = code(x * 1, x * 1) if product else code(x, x[0].detach(), 1e-5)
                out.backward(out.detach())


@contextmanager
def _no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with world(DEVICE) as opened:
        yield opened


@pytest.mark.parametrize("kernels", KINDS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES[:1] if DRY else FAMILIES)
def test_a_small_model_trains_like_upstream(family, precision, kernels, ranks, tmp_path):
    """By the check that precedes every run."""
    (tmp_path / family).mkdir()
    folder = upstream.write_random(tmp_path / family, small_config(family))
    config = _settings(folder, precision, "auto", False)
    config = replace(config, train=replace(config.train, kernels=kernels))
    verdict: Verdict = check_model(config, folder, ranks)
    assert not verdict.fell
