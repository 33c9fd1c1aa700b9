"""The twin of a model that is no causal language model: its outputs and gradients against upstream's.

Each row runs alone and unpadded through upstream's model, and padded together with others through ours. What is
compared of a row is the product of its outputs with fixed random weights: every output counts, whatever the loss.
"""

from __future__ import annotations

import torch
from torch import nn

from fsdp_qlora.checks import reference
from fsdp_qlora.checks.reference import Computed
from fsdp_qlora.checks.twin import Twin
from fsdp_qlora.data.texts import pad_token

Row = dict[str, torch.Tensor]


class TaskTwin(Twin):
    """Compares a small model of another task with upstream's."""

    def _compare(self) -> str | None:
        values = self._adapter_values()
        rows = [{name: value.to(self.ranks.device) for name, value in row.items()} for row in self._task_rows()]
        wanted = self._upstream(torch.float32, values, rows)
        mine = self._ours_of(rows)
        if self.config.precision.name == "bf16":
            theirs = self._upstream(torch.bfloat16, values, rows)
            problem = self._bf16_differs(mine, theirs, wanted)
        else:
            problem = self._losses_differ(mine, wanted) or self._gradients_differ(mine, wanted)
        return problem or self._exported_differs(values)

    def _task_rows(self) -> list[Row]:
        return self.objective.probe(self.model.base.config, torch.Generator().manual_seed(1))

    def _upstream(self, dtype: torch.dtype, values: dict[str, torch.Tensor], rows: list[Row]) -> Computed:
        """Return upstream's results, each row alone, in evaluation mode: a task's classes have dropout of their own."""
        adapted = self._reference_model(dtype, values).eval()
        scores = [_score(adapted(**_cast(row, dtype)), [_length(row)]) for row in rows]
        torch.cat(scores).sum().backward()
        return Computed([score.detach() for score in scores], reference.gradients_of(adapted))

    def _ours_of(self, rows: list[Row]) -> Computed:
        self.model.eval()
        scores = _score(self.model.outputs(**self._together(rows)), [_length(row) for row in rows])
        scores.sum().backward()
        return Computed(list(scores.detach().split(1)), self._own_gradients())

    def _together(self, rows: list[Row]) -> Row:
        """Return the rows as one batch, padded on the right."""
        pads: dict[str, int] = dict.fromkeys(("input_ids", "decoder_input_ids"), pad_token(self.model.base.config))
        together: Row = {}
        for name in dict.fromkeys(name for row in rows for name in row):
            values = [row[name] for row in rows if name in row]  # a row without images lacks them
            if len({value.shape for value in values}) > 1:
                longest = max(value.shape[1] for value in values)
                pad = pads.get(name, 0)
                values = [nn.functional.pad(value, (0, longest - value.shape[1]), value=pad) for value in values]
            together[name] = torch.cat(values)
        return together

    def _first_difference(self) -> str:
        """Say nothing: modules see other rows here than upstream's do."""
        return ""


def _cast(row: Row, dtype: torch.dtype) -> Row:
    """Return a row with what is no token (a spectrogram) in the model's dtype; some classes do not cast it."""
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in row.items()}


def _length(row: Row) -> int:
    """Return the number of outputs of a row that has one for each token."""
    tokens = row.get("decoder_input_ids", row.get("input_ids"))
    return 0 if tokens is None else tokens.shape[1]


def _score(outputs: object, lengths: list[int]) -> torch.Tensor:
    """Return one float32 number for each row, ``[rows]``: its outputs times fixed random weights."""
    values = getattr(outputs, "logits", None)
    values = (getattr(outputs, "last_hidden_state", None) if values is None else values).float()  # type: ignore[union-attr]
    draw = torch.Generator().manual_seed(0)
    weights = torch.randn(values.shape[-1] if values.dim() > 2 else values[0].shape, generator=draw).to(values.device)
    if values.dim() > 2:  # drawn for one token: each has the same weights in any batch
        weights = weights * torch.arange(1, values.shape[1] + 1, device=values.device)[:, None].cos()
        count = torch.tensor(lengths, device=values.device)
        shown = torch.arange(values.shape[1], device=values.device)[None] < count[:, None]
        values = values.masked_fill(~shown[..., None], 0.0)
    return (values * weights).flatten(1).sum(1) / values.shape[-1] ** 0.5
