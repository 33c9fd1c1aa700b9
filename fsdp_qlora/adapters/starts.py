"""Starts from the base weights: PiSSA, OLoRA and LoftQ, for one matrix that is whole on one rank.

With scaling s, each gives A ``[r, in]`` and B ``[out, r]`` such that W is about ``base + s B A``, and tells which
product is taken off W before the base is stored.

- PiSSA (https://arxiv.org/abs/2404.02948): B and A hold the r largest singular values, half of each; the base is
  ``W - s B A``. ``pissa_niter_N`` finds them by a randomized SVD with N iterations.
- OLoRA (https://arxiv.org/abs/2406.01775): ``W = Q R``, B is the first columns of Q, A the first rows of R; the base is
  ``W - s B A``.
- LoftQ (https://arxiv.org/abs/2310.08659, algorithm 1): alternately, the base is what ``W - s B A`` is quantized to
  (first with B A = 0), and ``s B A`` the best approximation of rank r of what that loses. The scaling is ours: the
  paper has none, and PEFT leaves it out.

PiSSA and OLoRA are operation for operation PEFT's, in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import svd_lowrank

from fsdp_qlora.errors import NumericsError
from fsdp_qlora.load.weights import LowRank, minus
from fsdp_qlora.quant.formats import Format, dequantize, quantize
from fsdp_qlora.shapes.linears import FLOAT32, LinearShape

LARGE = 4096
"""Smaller side of a matrix beyond which its exact SVD needs confirmation."""
_NITER = "pissa_niter_"


@dataclass(frozen=True)
class Start:
    """Where LoRA's matrices of one target start, and what the base loses to them."""

    a: torch.Tensor
    """float32 ``[r, in_features]``."""
    b: torch.Tensor
    """float32 ``[out_features, r]``."""
    before: LowRank | None = None
    """LoftQ's product, with its scaling, before the last alternation; None if there was one alternation."""

    def taken(self, name: str, scaling: float) -> LowRank | None:
        """Return what is taken off the weight before it is stored, for the start called ``name``; None: nothing."""
        return self.before if name == "loftq" else LowRank(self.b * scaling, self.a)


def begin(
    name: str, weight: torch.Tensor, r: int, scaling: float, seed: int, quant_format: Format | None, iterations: int = 1
) -> Start:  # fmt: skip
    """Return the start called ``name`` (`LoraSettings.start`) for a weight.

    Args:
        name: ``pissa``, ``pissa_niter_N``, ``olora`` or ``loftq``.
        weight: float32 ``[out_features, in_features]``.
        r: the rank.
        scaling: s, by which the adapter's product is multiplied.
        seed: seed of the randomized SVD.
        quant_format: how the base is stored; LoftQ needs one.
        iterations: alternations of LoftQ.

    Raises:
        NumericsError: if the decomposition does not converge.
    """
    try:
        return _begin(name, weight, r, scaling, seed, quant_format, iterations)
    except torch.linalg.LinAlgError as error:  # type: ignore[reportPrivateImportUsage]
        raise NumericsError(f"lora.init_lora_weights: {name}: a weight has no decomposition: {error}.") from error


def _begin(
    name: str, weight: torch.Tensor, r: int, scaling: float, seed: int, quant_format: Format | None, iterations: int
) -> Start:
    if name == "olora":
        q, upper = torch.linalg.qr(weight)
        return Start(upper[:r].contiguous(), q[:, :r].contiguous())
    if name == "loftq":
        assert quant_format is not None
        return _loftq(weight, r, scaling, quant_format, iterations)
    if name == "pissa":
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        return Start(*_halves(left, values, right, r, scaling))
    with torch.random.fork_rng(devices=[] if weight.device.type == "cpu" else [weight.device]):
        torch.manual_seed(seed)
        left, values, right = svd_lowrank(weight, r, niter=int(name.removeprefix(_NITER)))
    return Start(*_halves(left, values, right.t(), r, scaling))


def _halves(
    left: torch.Tensor, values: torch.Tensor, right: torch.Tensor, r: int, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B, each with the roots of the r largest singular values over the scaling."""
    roots = torch.diag(torch.sqrt(values[:r] / scaling))
    return roots @ right[:r], left[:, :r] @ roots


def _loftq(weight: torch.Tensor, r: int, scaling: float, quant_format: Format, iterations: int) -> Start:
    before: LowRank | None = None
    a = b = weight
    for number in range(iterations):
        before = LowRank(b * scaling, a) if number else None
        a, b = _of_the_lost(weight, before, r, scaling, quant_format)
    return Start(a, b, before)


def _of_the_lost(
    weight: torch.Tensor, before: LowRank | None, r: int, scaling: float, quant_format: Format
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B of what quantizing ``weight - before`` loses of ``weight``."""
    base = weight if before is None else minus(weight, before)
    lost = dequantize(quantize(base, quant_format), quant_format, tuple(base.shape), torch.float32)
    del base  # it is as large as the weight
    left, values, right = torch.linalg.svd(torch.sub(weight, lost, out=lost), full_matrices=False)
    return _halves(left, values, right, r, scaling)


def is_exact(name: str) -> bool:
    """Whether a start takes the exact SVD of a matrix."""
    return name in ("pissa", "loftq")


def operations(name: str, linear: LinearShape, r: int, iterations: int) -> float:
    """Return the floating-point operations of a start, about (Golub and Van Loan, Matrix Computations)."""
    long, short = sorted((linear.out_features, linear.in_features), reverse=True)
    if name == "olora":
        return 4 * long * short**2 - 4 / 3 * short**3
    if is_exact(name):
        return (6 * long * short**2 + 20 * short**3) * (iterations if name == "loftq" else 1)
    return 4.0 * long * short * r * (int(name.removeprefix(_NITER)) + 1)


def workspace(name: str, linear: LinearShape, r: int) -> int:
    """Return the bytes that a start needs on the rank whose turn it is: the weight, and what decomposes it."""
    long, short = sorted((linear.out_features, linear.in_features), reverse=True)
    whole, square = long * short, short**2
    if name == "olora":  # weight, LAPACK's copy, Q and R
        return FLOAT32 * (3 * whole + square)
    if is_exact(name):  # weight, LAPACK's copy, U and V of its size together, and gesdd's workspace of 4 squares
        quantized = 2 * whole if name == "loftq" else 0  # what is lost, and what quantizing leaves in the allocator
        return FLOAT32 * (3 * whole + quantized + 5 * square)
    return FLOAT32 * (whole + 4 * r * (long + short))
