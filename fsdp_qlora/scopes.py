"""Names of the scopes that `debug=profile` goes by: ``with torch.profiler.record_function(OPTIMIZER): ...``.

A scope costs some microseconds where no profiler runs, so there are few: none inside a layer, where operators are known
by their own names (`fsdp_qlora.profile.phases` says which). All that runs inside one of `HEAD`, `ATTENTION`,
`DEQUANTIZE`, `GATHER`, `OPTIMIZER` and `DATA` belongs to that phase, whatever its name.
"""

from __future__ import annotations

STEP = "fsdp_qlora::step"
"""A step from asking for its batch to the update: what the table divides."""
DATA = "fsdp_qlora::data"
"""Waiting for the batch."""
OPTIMIZER = "fsdp_qlora::optimizer"
"""The gradient's norm, clipping and the update."""
HEAD = "fsdp_qlora::head"
"""The loss head: its matrix products and softmax."""
ATTENTION = "fsdp_qlora::attention"
"""Scores, softmax and the weighted sum; not the projections."""
ATTENTION_BLOCK = "fsdp_qlora::attention_block"
"""A module with its projections: batched products and the softmax in it are attention, all else goes by its name."""
DEQUANTIZE = "fsdp_qlora::dequantize"
"""4-bit codes and statistics to numbers."""
GATHER = "fsdp_qlora::gather"
"""Copies before and after a collective, and starting it."""
