"""How many dense copies of quantized weights exist at a time; arithmetic only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from fsdp_qlora.quant.formats import Packed
from fsdp_qlora.quant.matrix import WHOLE_WEIGHTS
from fsdp_qlora.quant.stack import dense_at_once
from fsdp_qlora.shapes.linears import LinearShape


@dataclass(frozen=True)
class DenseWeights:
    """Numbers of elements."""

    product: int
    """The most beside the activations while a product is computed."""
    product_kept: int
    """Likewise, if the weights that may be kept dense are: they are counted in ``kept``."""
    kept: int
    """All weights that may be kept dense."""

    @staticmethod
    def of(
        quantized: Iterable[Packed], trained: Mapping[str, Mapping[str, tuple[int, ...]]], on_accelerator: bool
    ) -> DenseWeights:
        """Count for the quantized weights of the decoder layers; ``trained`` are each target's trained shapes."""
        product = product_kept = kept = 0
        for x in quantized:
            weights, more = dense_at_once(x.linear, on_accelerator), _adapters(x.linear, trained)
            stays = x.quant_format.dense_forward and x.linear.numel_each <= WHOLE_WEIGHTS
            product = max(product, weights + more)
            product_kept = max(product_kept, more if stays else weights + more)
            kept += x.linear.numel if stays else 0
        return DenseWeights(product, product_kept, kept)


def _adapters(linear: LinearShape, trained: Mapping[str, Mapping[str, tuple[int, ...]]]) -> int:
    """Return the copies of stacked adapters: in the order of experts, their gradients in it, and in PEFT's."""
    return 3 * sum(map(prod, trained.get(linear.name, {}).values())) if linear.stacked else 0
