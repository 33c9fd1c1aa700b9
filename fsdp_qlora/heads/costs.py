"""Memory of a loss over a large vocabulary, by arithmetic; `plan` adds it up."""

from __future__ import annotations

from fsdp_qlora.quant.matrix import SLICE_WEIGHTS
from fsdp_qlora.shapes.linears import FLOAT32

LOGIT_COPIES = 2
"""Tensors ``[chunk, vocab]`` of the chunked cross entropy at once on a CPU: of this chunk and of the previous one."""
SLICE_COPIES = 5
"""Float32 tensors of the sliced cross entropy at once: three of this slice and two of the previous one."""
FLOAT_LOGITS_BYTES = 64 * 2**20
"""Assumed limit on the part of a chunk's logits that is float32 at a time on a CPU."""


def chunked_bytes(
    chunk: int, vocab_size: int, itemsize: int, on_accelerator: bool, capped: bool = False, by_code: bool = False
) -> int:
    """Return the bytes of a dense head's loss (`heads/dense.py`), ``chunk`` tokens at a time.

    An accelerator holds a chunk's logits in their own dtype, and either in float32 (twice with a soft cap) or, while
    they are multiplied, those of the previous chunk. A CPU has a part of them in float32 at a time. Where upstream's
    code runs on them, its output and the gradient are there, too, and the loss is differentiated by autograd.
    """
    logits = chunk * vocab_size
    own, floats = logits * itemsize, logits * FLOAT32
    if by_code:
        return 3 * own + 2 * floats
    if on_accelerator:
        return own + max(own, floats * (2 if capped else 1))
    return LOGIT_COPIES * (own + min(floats, FLOAT_LOGITS_BYTES))


def sliced_bytes(chunk: int, tokens: int, vocab_size: int, hidden_size: int, itemsize: int) -> int:
    """Return the bytes of a quantized head's loss (`heads/quantized.py`), a slice of the vocabulary at a time.

    The sum of three parts: logits for a chunk of tokens and a slice; two dense slices, because one is freed only once
    the next one exists; and the gradient of the hidden states of all ``tokens``, in float32 and in its final dtype.
    """
    rows = min(SLICE_WEIGHTS // hidden_size, vocab_size)
    slope = tokens * hidden_size * (FLOAT32 + itemsize)
    return chunk * rows * FLOAT32 * SLICE_COPIES + 2 * rows * hidden_size * itemsize + slope
