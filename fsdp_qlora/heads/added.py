"""Rows of embedding and head for added tokens: a few trained rows that follow the frozen table's.

The tokens of the base have the ids ``0 .. first - 1``, the added ones those from ``first`` on. Below ``first`` a table
is the base's, from there on it is ours, and the base's own rows from there on (the padding of a vocabulary) are never
read. So the vocabulary ends with the last added token, as after ``resize_token_embeddings(len(tokenizer))`` in plain
transformers, and no table is copied, as PEFT's ``index_copy`` does in each forward.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.reduce import on_every
from fsdp_qlora.distributed.shards import row_range
from fsdp_qlora.errors import PlanError
from fsdp_qlora.load.finite import require_finite
from fsdp_qlora.load.safetensors import SafetensorsFolder
from fsdp_qlora.load.stored import find_kept
from fsdp_qlora.quant.embedding import QuantEmbedding
from fsdp_qlora.quant.packing import CHUNK_WEIGHTS
from fsdp_qlora.shapes.linears import ModelShapes
from fsdp_qlora.shapes.tokens import tables_of_tokens


class TokenRows(nn.Module):
    """The rows ``[count, hidden]`` of the tokens from ``first`` on, float32 and whole on every rank.

    They are too few to shard: FSDP would gather them with their unit, and the head could not train them without
    gathering the head again for backward.
    """

    def __init__(self, first: int, count: int, hidden_size: int) -> None:
        super().__init__()
        self.first, self.last = first, first + count
        self.trainable_tokens_delta = nn.Parameter(torch.empty(count, hidden_size, dtype=torch.float32, device="meta"))


class TokenEmbedding(nn.Module):
    """An embedding whose rows from ``token_adapter.first`` on are trained.

    Shapes: int64 ``[...]`` -> ``[..., hidden]`` in the dtype of ``base_layer``, times ``scale``, as in ``base_layer``.
    """

    def __init__(self, base_layer: nn.Module, rows: TokenRows, scale: float) -> None:
        super().__init__()
        self.base_layer, self.token_adapter, self.scale = base_layer, rows, scale

    @property
    def num_embeddings(self) -> int:
        """Number of token ids, the added ones included."""
        return self.token_adapter.last

    @property
    def weight(self) -> torch.Tensor:
        """The frozen table of the base, if it is not quantized (upstream asks for its dtype and device)."""
        return self.base_layer.weight  # type: ignore[return-value]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the rows of the token ids ``input``."""
        rows = self.token_adapter
        is_added = input >= rows.first
        out = self.base_layer(input.masked_fill(is_added, 0))
        # looked up in float32, so that the gradients of all places of a token add up in float32
        added = F.embedding((input - rows.first).clamp(min=0), rows.trainable_tokens_delta).to(out.dtype)
        if self.scale != 1.0:
            added = added * torch.tensor(self.scale, dtype=added.dtype, device=added.device)
        return torch.where(is_added.unsqueeze(-1), added, out)


class WithTokenRows(nn.Module):
    """A head that may have trained rows: its own, or those of the embedding it is tied to."""

    _rows: tuple[TokenRows | None] = (None,)  # in a tuple, so that rows of the embedding are not registered twice

    @property
    def rows(self) -> TokenRows | None:
        """The trained rows, if any."""
        return self._rows[0]

    def train_rows(self, rows: TokenRows, tied: bool) -> None:
        """Take the logits of added tokens from ``rows``."""
        self._rows = (rows,)
        if not tied:
            self.token_adapter = rows

    @property
    def trained(self) -> torch.Tensor | None:
        """The trained rows as they are now, float32 ``[count, hidden]``, if there are any."""
        return None if self.rows is None else self.rows.trainable_tokens_delta


def add_token_rows(model: PreTrainedModel, shapes: ModelShapes, first: int | None, count: int) -> None:
    """Add rows for ``count`` tokens from ``first`` on (None: after all rows of the base) to embedding and loss head.

    Raises:
        PlanError: if the embedding does more than look up and scale rows, or upstream more with its logits than to
            scale and cap them.
    """
    if not count:
        return
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(table, nn.Module) and isinstance(head, WithTokenRows)
    if getattr(head, "code", None) is not None:
        raise PlanError(
            "model.add_tokens: this model's own code does more with its logits than scale and cap them, and expects "
            "as many as its config says; leave it out."
        )
    first = shapes.embedding_rows if first is None else first
    rows = TokenRows(first, count, shapes.hidden_size)
    model.set_input_embeddings(TokenEmbedding(table, rows, _scale(table)))
    head.train_rows(rows if shapes.tied else TokenRows(first, count, shapes.hidden_size), shapes.tied)


def _scale(table: nn.Module) -> float:
    if type(table) is nn.Embedding:
        return 1.0
    scale = table.scale if isinstance(table, QuantEmbedding) else getattr(table, "scalar_embed_scale", None)
    if not isinstance(scale, int | float):
        raise PlanError(
            f"model.add_tokens: a {type(table).__name__} does more than look up rows, so it cannot get new ones; leave "
            "it out."
        )
    return float(scale)


_BITS = 32
"""Fractional bits of the fixed-point sums: 2**18 rows of values up to 2**12 fit into 63 bits."""
_LARGEST = 2.0**12


@torch.no_grad()
def start_token_rows(model: PreTrainedModel, shapes: ModelShapes, source: SafetensorsFolder, ranks: Ranks) -> None:
    """Start the rows of added tokens at the mean of the base's tokens. Every rank calls it.

    This is what transformers' ``resize_token_embeddings`` does, less its noise of a billionth of the covariance (after
    J. Hewitt, https://nlp.stanford.edu/~johnhew/vocab-expansion.html), and without the rows of a padded vocabulary.
    The sums are integers, so that every number of ranks gets the same bits.
    """
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(table, TokenEmbedding):
        return
    assert isinstance(head, WithTokenRows) and head.trained is not None
    trained = {shapes.head: head.trained, shapes.embedding: table.token_adapter.trainable_tokens_delta}
    for name in tables_of_tokens(shapes):
        trained[name].copy_(_mean(f"{name}.weight", table.token_adapter.first, shapes, source, ranks))


def _mean(name: str, count: int, shapes: ModelShapes, source: SafetensorsFolder, ranks: Ranks) -> torch.Tensor:
    """Return the mean of the first ``count`` rows of a table, float32 ``[hidden]``; each rank reads its share."""
    width = shapes.hidden_size
    total = torch.zeros(width, dtype=torch.int64)

    def add_mine() -> None:
        entry = find_kept(source, name, shapes.parameters[name])
        start, stop = row_range(min(count, shapes.parameters[name][0]), ranks.rank, ranks.size)
        step = max(1, CHUNK_WEIGHTS // width)
        for row in range(start, stop, step):
            values = source.read(entry, row * width, min(row + step, stop) * width)
            require_finite(values, f"{entry.file}: tensor {entry.name}")
            fixed = values.double().clamp(-_LARGEST, _LARGEST).mul_(2.0**_BITS).round_().long()
            total.add_(fixed.view(-1, width).sum(0))

    on_every(add_mine, ranks)
    total = total.to(ranks.device)
    dist.all_reduce(total, group=ranks.group)
    return (total.double() / 2.0**_BITS / count).float()
