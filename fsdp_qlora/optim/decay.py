"""What weight decay leaves out: biases and norms, as transformers' ``Trainer.get_decay_parameter_names`` does."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

_LEFT_OUT = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
"""Upstream's patterns; they are looked for in names in lower case."""


def undecayed_parameters(model: nn.Module) -> Iterator[str]:
    """Yield the names of a model's parameters that do not decay: those of an `nn.LayerNorm`, and by their names."""
    norms = {parameter for m in model.modules() if isinstance(m, nn.LayerNorm) for parameter in m.parameters()}
    for name, parameter in model.named_parameters():
        if parameter in norms or _LEFT_OUT.search(name.lower()):
            yield name
