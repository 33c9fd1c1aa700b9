"""`QuantLinear`: a frozen linear layer with a 4-bit weight."""

from __future__ import annotations

import torch

from fsdp_qlora.quant.formats import Format
from fsdp_qlora.quant.matrices import QuantMatrices, frozen


class QuantLinear(QuantMatrices):
    """A linear layer with a frozen weight in ``quant_format``; ``bias`` is ``[out_features]`` or None.

    Shapes: ``[..., in_features]`` -> ``[..., out_features]``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        quant_format: Format,
        bias: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "meta",
    ) -> None:
        super().__init__(in_features, out_features, quant_format, device=device)
        self.bias = frozen(torch.empty(out_features, dtype=dtype, device=device)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x @ weight.T + bias``."""
        out = self.matmul(x)
        return out if self.bias is None else out + self.bias  # type: ignore[operator]

    def extra_repr(self) -> str:
        """Show shape, bias and format."""
        return f"{super().extra_repr()}, bias={self.bias is not None}"


class ReadableLinear(QuantLinear):
    """A `QuantLinear` under an adapter layer of PEFT's, which may read its ``weight``: the numbers, never the bytes."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        quant_format: Format,
        bias: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "meta",
    ) -> None:
        super().__init__(in_features, out_features, quant_format, bias, dtype, device)
        self._dtype = dtype

    @property
    def weight(self) -> torch.Tensor:
        """The matrix ``[out_features, in_features]``, dequantized anew each time; writing into it changes nothing."""
        return self.dequantize(self._dtype)
