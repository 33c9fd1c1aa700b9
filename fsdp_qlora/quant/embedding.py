"""`QuantEmbedding`: a quantized embedding table that dequantizes only the rows it looks up."""

from __future__ import annotations

import torch

from fsdp_qlora.errors import PlanError
from fsdp_qlora.quant.formats import Format
from fsdp_qlora.quant.matrices import QuantMatrices


class QuantEmbedding(QuantMatrices):
    """A frozen table ``[num_embeddings, embedding_dim]`` in ``quant_format``.

    Shapes: int64 ``[...]`` -> ``[..., embedding_dim]`` in ``dtype``, times ``scale`` (Gemma scales its embeddings).
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, quant_format: Format, dtype: torch.dtype,
        scale: float = 1.0, device: torch.device | str = "meta",
    ) -> None:  # fmt: skip
        if why := quant_format.cannot_look_up(embedding_dim):
            raise PlanError(
                f"quant.embeddings: {why}, so the rows of the embedding share blocks. Set "
                "quant.embeddings=none or int8."
            )
        super().__init__(embedding_dim, num_embeddings, quant_format, device=device)
        self.dtype, self.scale = dtype, scale

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the rows of the token ids ``input``."""
        table = self.matrix().quantized
        assert table is not None
        rows = self.quant_format.look_up(table, input.reshape(-1), self.in_features, self.dtype)
        rows = rows.view(*input.shape, self.in_features)
        return rows if self.scale == 1.0 else rows * torch.tensor(self.scale, dtype=rows.dtype, device=rows.device)
