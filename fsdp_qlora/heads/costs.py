"""What a loss over a large vocabulary holds on the device, by arithmetic; `plan` adds it up."""

from __future__ import annotations

from fsdp_qlora.quant.matrix import SLICE_WEIGHTS
from fsdp_qlora.shapes.linears import FLOAT32

LOGIT_COPIES = 2
"""Tensors ``[chunk, vocab]`` of the chunked cross entropy at once: this chunk's and the last one's."""
SLICE_COPIES = 5
"""Float32 tensors of the sliced cross entropy at once: of this slice three, of the last two."""
FLOAT_LOGITS_BYTES = 64 * 2**20
"""Of a chunk's logits that are float32 at the same time (`heads/logprobs.py`)."""


def chunked_bytes(chunk: int, vocab_size: int, itemsize: int) -> int:
    """Return the bytes of a dense head's loss (`heads/dense.py`), ``chunk`` tokens at a time."""
    logits = chunk * vocab_size
    return LOGIT_COPIES * (logits * itemsize + min(logits * FLOAT32, FLOAT_LOGITS_BYTES))


def sliced_bytes(chunk: int, tokens: int, vocab_size: int, hidden_size: int, itemsize: int) -> int:
    """Return the bytes of a quantized head's loss (`heads/quantized.py`), a slice of the vocabulary at a time.

    Logits of a chunk of tokens and a slice; two dense slices, as one is freed when the next one is there; and the
    gradient of all ``tokens``' hidden states, added up over the slices in float32, then rounded.
    """
    rows = min(SLICE_WEIGHTS // hidden_size, vocab_size)
    slope = tokens * hidden_size * (FLOAT32 + itemsize)
    return chunk * rows * FLOAT32 * SLICE_COPIES + 2 * rows * hidden_size * itemsize + slope
