"""What an objective is: it turns the model and a micro-batch into a *sum* over what is learned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn

from fsdp_qlora.data.labels import Sequences


class MicroBatch(Protocol):
    """What an objective needs of a micro-batch."""

    @property
    def input_ids(self) -> torch.Tensor:
        """int64 ``[rows, length]``."""
        ...

    @property
    def labels(self) -> torch.Tensor:
        """int64 ``[rows, length]``, -100 where not learned."""
        ...

    @property
    def position_ids(self) -> torch.Tensor | None:
        """int64 ``[rows, length]``, starting anew at each packed row; None where a sequence is one row."""
        ...

    @property
    def sequences(self) -> Sequences | None:
        """Where the rows of one flat row begin and end; None where positions tell, or each line is one row."""
        ...

    @property
    def rare(self) -> bool:
        """Whether layers are not worth compiling for its form."""
        ...

    @property
    def supervised(self) -> torch.Tensor:
        """int64 ``[targets]``: positions of the flattened labels whose next token is learned."""
        ...


Objective = Callable[[nn.Module, MicroBatch, torch.device], torch.Tensor]
"""(model, micro-batch, device) -> sum of losses, a float32 scalar."""
