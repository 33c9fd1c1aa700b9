"""Names of the profiler scopes behind `debug=profile`: ``with torch.profiler.record_function(OPTIMIZER): ...``.

A scope costs a few microseconds even if no profiler runs, so there are few. Inside a layer there are none, because
operators are recognised by their own names (see `fsdp_qlora.profile.phases`). Everything that runs inside `HEAD`,
`ATTENTION`, `DEQUANTIZE`, `GATHER`, `OPTIMIZER` or `DATA` belongs to that phase, whatever its name.
"""

from __future__ import annotations

STEP = "fsdp_qlora::step"
"""A whole step, from requesting its batch to the update; the table divides this time."""
DATA = "fsdp_qlora::data"
"""Waiting for the batch."""
OPTIMIZER = "fsdp_qlora::optimizer"
"""Gradient norm, clipping and the update."""
HEAD = "fsdp_qlora::head"
"""The loss head: its matrix products and softmax."""
ATTENTION = "fsdp_qlora::attention"
"""Scores, softmax and the weighted sum, without the projections."""
ATTENTION_BLOCK = "fsdp_qlora::attention_block"
"""An attention module with its projections: batched products and softmax count as attention, the rest by its name."""
DEQUANTIZE = "fsdp_qlora::dequantize"
"""Converting 4-bit codes and statistics to floating-point numbers."""
GATHER = "fsdp_qlora::gather"
"""Copies before and after a collective, and launching it."""
