"""The settings that determine memory."""

from __future__ import annotations

from dataclasses import dataclass

from fsdp_qlora.config.schema import LoraSettings, OptimSettings


@dataclass(frozen=True)
class StorageSettings:
    """The settings that determine memory."""

    shard_size: int
    itemsize: int
    """Bytes per unquantized base element and per activation element: 2 (bf16) or 4 (fp32)."""
    lora: LoraSettings
    optim: OptimSettings
    micro_batch_size: int
    max_length: int
    checkpointing: str
    """``none``, ``selective`` or ``full``."""
    attention: str
    """The attention implementation: ``eager`` and ``blockwise`` keep scores, the others do not."""
    logits_chunk: int
    restarting: bool = False
    """Positions restart within a row (packed rows), so that sdpa needs a mask."""
    quantized_embeddings: bool = False
    offload_parameters: bool = False
    """Shards, their gradients and optimizer states live in host memory."""
    offload_activations: bool = False
    """Activations kept for backward live in host memory."""
    prefetch: int = 1
    """Number of units gathered ahead."""
    reshard_after_forward: bool = True
    cache_dequantized: bool = False
    """Dense weights are kept from forward to backward, or for good (`keeps_dense`)."""
    accumulation_steps: int = 1
    adapter_copies: int = 0
    """Ranks that each hold the adapters whole (``fsdp.adapters=replicated``); 0 if they are sharded."""
    on_accelerator: bool = False
    keeps_whole: bool = False
    """Each rank keeps all parameters on its device, so that nothing is gathered."""

    @property
    def keeps_dense(self) -> bool:
        """Whether dense weights are kept from step to step: the base never changes, and no one reshards it."""
        return self.cache_dequantized and self.keeps_whole

    @property
    def adapter_shards(self) -> int:
        """Ranks that share one copy of the adapters, their gradients and their optimizer states."""
        return 1 if self.adapter_copies else self.shard_size

    @property
    def layers_stay(self) -> bool:
        """Whether layers stay gathered from forward to backward, and from one micro-batch to the next."""
        return self.shard_size > 1 and not self.reshard_after_forward

    @property
    def copied_ahead(self) -> int:
        """Layers that a rank which shards with no other copies ahead from host memory (`parallel/copy_ahead.py`)."""
        return self.prefetch if self.offload_parameters and self.shard_size == 1 else 0

    @property
    def edges_stay(self) -> bool:
        """Whether the embedding and the head stay gathered for the whole step; in one micro-batch no one needs it."""
        return self.layers_stay and self.accumulation_steps > 1

    @property
    def tokens(self) -> int:
        """Tokens in a micro-batch."""
        return self.micro_batch_size * self.max_length
