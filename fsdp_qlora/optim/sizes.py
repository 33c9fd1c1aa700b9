"""The size of optimizer states, by arithmetic only; `optim/` allocates what is counted here.

Not counted: step counters (numbers on the host) and the two tables of 256 values shared by all 8-bit states of a
process (2 KiB).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from math import prod

from fsdp_qlora.config.schema import OptimSettings
from fsdp_qlora.distributed.shards import row_range
from fsdp_qlora.shapes.linears import FLOAT32

BLOCK_SIZE = 256
"""Elements of an 8-bit state that share one float32 absmax (bitsandbytes' block of optimizer states)."""
MIN_8BIT_SIZE = 4096
"""Smaller parameters have float32 states (bitsandbytes' ``min_8bit_size``); counted over all ranks, not per shard."""
EMBEDDINGS = ("*embed*", "*.wte.*", "*.wpe.*", "*.shared.*")
"""Names of embeddings, whose states stay in float32 (as in transformers): their rows get gradients unevenly."""
MOMENTS = {
    "adamw": 2,
    "adamw_8bit": 2,
    "paged_adamw_8bit": 2,
    "paged_adamw_32bit": 2,
    "lion_8bit": 1,
    "ademamix_8bit": 3,
    "sgd": 1,
}
"""Optimizer -> number of states per element; adafactor has row and column statistics instead."""


def num_blocks(numel: int) -> int:
    """Return the number of blocks for ``numel`` elements; the last one may be partial."""
    return -(-numel // BLOCK_SIZE)


def num_codes(optimizer: str, numel: int) -> int:
    """Return the number of 8-bit codes in one state of ``numel`` elements.

    AdEMAMix's states are padded to whole blocks: its CUDA kernel looks up the second moment's absmax at index
    ``numel // 256``, which is still the first moment's last one unless all blocks are full.
    """
    return num_blocks(numel) * BLOCK_SIZE if optimizer == "ademamix_8bit" else numel


def keeps_8bit(settings: OptimSettings, name: str, numel: int) -> bool:
    """Whether the states of a parameter with ``numel`` elements over all ranks are kept in 8 bits."""
    small = numel < MIN_8BIT_SIZE
    kept = any(fnmatchcase(name, pattern) for pattern in (*EMBEDDINGS, *settings.override_32bit))
    return settings.name.endswith("_8bit") and not small and not kept


def state_bytes(settings: OptimSettings, name: str, shape: Sequence[int], rank: int = 0, num_ranks: int = 1) -> int:
    """Return the bytes of state that ``rank`` keeps for a parameter, sharded along dimension 0; rank 0 has the most."""
    start, stop = row_range(shape[0], rank, num_ranks)
    numel = (stop - start) * prod(shape[1:])
    if settings.name == "adafactor":
        if len(shape) == 1:
            return FLOAT32 * numel
        # every rank holds all column statistics of a matrix
        columns = shape[1] if len(shape) == 2 else numel // shape[-2]
        return FLOAT32 * (numel // shape[-1] + columns)
    moments = MOMENTS[settings.name] if settings.name != "sgd" or settings.beta1 else 0
    if not keeps_8bit(settings, name, prod(shape)):
        return FLOAT32 * numel * moments
    return moments * (num_codes(settings.name, numel) + FLOAT32 * num_blocks(numel))


def temporary_bytes(settings: OptimSettings, parameters: int, fused: bool = False) -> int:
    """Return the bytes that an update needs beside ``parameters`` bytes of float32 parameters, gradients and state.

    torch's AdamW takes the root of all second moments at once, unless it is ``fused``, as on an accelerator. The other
    optimizers' temporaries are of one parameter.
    """
    return parameters if settings.name == "adamw" and not fused else 0


def unmatched(patterns: Iterable[str], names: Iterable[str]) -> list[str]:
    """Return the patterns that match no name."""
    known = tuple(names)
    return [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in known)]
