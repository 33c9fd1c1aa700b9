"""Liger-Kernel's functions, with the signatures of our formulas; the only module that imports it.

Nothing of upstream is patched (``apply_liger_kernel_to_*`` would patch modules of transformers): the functions are
called by modules of ours (`fsdp_qlora.model.fused`) and by the loss head.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from fsdp_qlora.model.formulas import (
    Formula,
    gelu_tanh_product,
    one_plus_weight,
    scaled_after_cast,
    scaled_before_cast,
    silu_product,
)

IGNORED = -100
"""Label without a loss, in Liger as in torch; our targets never hold it."""


def missing_packages() -> list[str]:
    """Return the packages that are needed and not installed."""
    packages = {"liger_kernel": "liger-kernel", "triton": "triton"}
    return [name for module, name in packages.items() if importlib.util.find_spec(module) is None]


def _liger() -> Any:
    return importlib.import_module("liger_kernel.ops")


def _scaled_after_cast(rows: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _rms_norm(rows, weight, eps, 0.0, "llama")


def _scaled_before_cast(rows: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _rms_norm(rows, weight, eps, 0.0, "gemma")


def _one_plus_weight(rows: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _rms_norm(rows, weight, eps, 1.0, "gemma")


def _rms_norm(rows: Tensor, weight: Tensor, eps: float, offset: float, casting: str) -> Tensor:
    # Not in place: backward would overwrite the gradient of its output, and where a norm comes last in a block
    # (Gemma 2, OLMo 2) the residual's gradient is the same tensor
    return _liger().LigerRMSNormFunction.apply(rows, weight, eps, offset, casting, False)


def _silu_product(gate: Tensor, up: Tensor) -> Tensor:
    # Backward overwrites gate and up with their gradients. Nothing else reads them: a linear saves its input only
    return _liger().LigerSiLUMulFunction.apply(gate, up)


def _gelu_tanh_product(gate: Tensor, up: Tensor) -> Tensor:
    return _liger().LigerGELUMulFunction.apply(gate, up)


CODE: dict[Formula, Formula] = {
    scaled_after_cast: _scaled_after_cast,
    scaled_before_cast: _scaled_before_cast,
    one_plus_weight: _one_plus_weight,
    silu_product: _silu_product,
    gelu_tanh_product: _gelu_tanh_product,
}
"""The formulas that Liger has kernels for."""


def cross_entropy_(
    logits: Tensor, targets: Tensor, scale: float, softcap: float | None, wants_grad: bool
) -> Tensor:  # fmt: skip
    """Return what `fsdp_qlora.heads.logprobs.cross_entropy_` returns, and leave the gradient in ``logits`` likewise.

    Launches the kernel itself, as Liger's fused linear cross entropy does: `LigerCrossEntropyFunction` rounds losses to
    the dtype of the logits and waits for the device three times.
    """
    liger = importlib.import_module("liger_kernel.ops.cross_entropy")
    rows, vocab = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    values = logits if scale == 1.0 else logits.float() * scale  # the kernel has no such factor
    liger.liger_cross_entropy_kernel[(rows,)](
        X_ptr=values, X_stride=values.stride(0), Y_ptr=targets, Y_stride=targets.stride(0),
        loss_ptr=losses, loss_stride=losses.stride(0), n_cols=vocab, ignore_index=IGNORED,
        softcap=softcap, HAS_SOFTCAPPING=softcap is not None, HAS_GRADIENTS=wants_grad,
        reduction="none", n_non_ignore=1, sum_non_ignore_weight=1, weight_sum=0.0, lse_square_scale=0.0,
        label_smoothing=0.0, weight_ptr=None, HAS_WEIGHT=False, z_loss_ptr=None, RETURN_Z_LOSS=False,
        token_accuracy_ptr=None, token_accuracy_stride=0, RETURN_TOKEN_ACCURACY=False,
        predicted_tokens_ptr=None, predicted_tokens_stride=0, RETURN_PREDICTED_TOKENS=False,
        BLOCK_SIZE=min(liger.MAX_FUSED_SIZE, 1 << (vocab - 1).bit_length()), num_warps=16 if torch.version.hip else 32,
    )  # fmt: skip
    if wants_grad and scale != 1.0:
        logits.copy_(values.mul_(scale))
    return losses
