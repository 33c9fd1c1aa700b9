"""Which code computes RMSNorms, gated activations and the loss of a chunk of logits (``train.kernels``).

`Kernels` leaves all of it to upstream's modules and `fsdp_qlora.heads`; a subclass has other code for some formulas.
Rotary embeddings are always upstream's: they are a function that upstream's attention calls by its global name, so
other code could only get there by a patch (docs/performance.md).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from fsdp_qlora.config.choices import Table
from fsdp_qlora.heads.logprobs import CrossEntropy, block_cross_entropy_, cross_entropy_, in_blocks
from fsdp_qlora.model import liger
from fsdp_qlora.model.formulas import Formula
from fsdp_qlora.parallel.compile import CompiledRegion, can_compile, settle_compiler, waiting_for_compiler
from fsdp_qlora.parallel.compile_cache import settle_compile_caches


class Kernels:
    """``torch``: everything as upstream's modules and our heads compute it."""

    name: ClassVar[str] = "torch"
    needs_modules: ClassVar[bool] = False
    """Whether a model of which no module can be replaced is refused."""

    def refusal(self, device: torch.device) -> str | None:
        """Return why this code cannot run on a device, and what to do; None if it can."""
        return None

    def begin(self) -> None:
        """Get ready for a new model."""

    def code(self, formula: Formula) -> Formula | None:
        """Return code that computes ``formula``; None leaves it to upstream's module."""
        return None

    @property
    def cross_entropy(self) -> CrossEntropy:
        """Code for the loss of a chunk of logits."""
        return cross_entropy_


class CompiledKernels(Kernels):
    """``compile``: each formula and the loss compiled on its own, where gradients are computed.

    Evaluation and generation run them uncompiled: their shapes would trigger more compilations.
    """

    name = "compile"

    def __init__(self) -> None:
        self._code: dict[Formula, Formula] = {}

    def refusal(self, device: torch.device) -> str | None:
        """Return which compiler is missing."""
        if can_compile(device):
            return None
        needs = "a C++ compiler" if device.type == "cpu" else "Triton, a C compiler and a GPU that Triton supports"
        return f"compile needs {needs}, which this machine lacks; install it, or set train.kernels=torch."

    def begin(self) -> None:
        """Set up the compiler, and let it forget what it compiled before."""
        settle_compile_caches(os.environ)
        settle_compiler()

    def code(self, formula: Formula) -> Formula:
        """Return ``formula``, compiled once for all modules."""
        return self._code.setdefault(formula, _compiled_for_gradients(formula))

    @property
    def cross_entropy(self) -> CrossEntropy:
        """The loss, compiled; it runs where autograd is off, and computes the gradient itself."""
        region = CompiledRegion(block_cross_entropy_)

        def compiled(
            logits: Tensor, targets: Tensor, scale: float, softcap: float | None, wants_grad: bool
        ) -> Tensor:  # fmt: skip
            block = region if wants_grad else block_cross_entropy_
            return in_blocks(block, logits, targets, scale, softcap, wants_grad)

        return compiled


def _compiled_for_gradients(formula: Formula) -> Formula:
    region = CompiledRegion(formula)
    return lambda *args: region(*args) if torch.is_grad_enabled() else formula(*args)


class LigerKernels(Kernels):
    """``liger``: Liger-Kernel's Triton kernels (https://arxiv.org/abs/2410.10989)."""

    name = "liger"
    needs_modules = True

    def refusal(self, device: torch.device) -> str | None:
        """Return what is missing: a package, or a GPU."""
        if device.type == "cpu":
            return "liger needs a GPU, and this run is on a CPU; set train.kernels=torch or compile."
        if missing := liger.missing_packages():
            return (
                f"liger needs {' and '.join(missing)}, not installed here; pip install 'fsdp-qlora[liger]', or set "
                "train.kernels=torch."
            )
        return None

    def begin(self) -> None:
        """Point Triton's compiler to a private folder."""
        settle_compile_caches(os.environ)

    def code(self, formula: Formula) -> Formula | None:
        """Return Liger's code for ``formula``, if it has any."""
        return liger.CODE.get(formula)

    @property
    def cross_entropy(self) -> CrossEntropy:
        """Liger's kernel for the loss and its gradient."""
        return liger.cross_entropy_


def kernels_to_compile(name: str, device: torch.device) -> str | None:
    """Return a line that says what ``train.kernels`` will compile and how long that takes, or None.

    The check at the start compiles, too, so it is to be shown before anything else.
    """
    if name != CompiledKernels.name:
        return None
    return f"train.kernels=compile: {waiting_for_compiler('norms, gated activations and the loss', device)}"


KERNELS: Table[Callable[[], Kernels]] = Table(
    "train.kernels", {kind.name: kind for kind in (Kernels, CompiledKernels, LigerKernels)}
)
"""``train.kernels=`` -> what it takes."""
