"""The weights of a base model with an adapter folded in, computed one tensor at a time (`merged.py` writes them)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from transformers import PreTrainedModel

from fsdp_qlora.adapters.fold import StoredAdapter, pieces_of
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.errors import ModelError
from fsdp_qlora.load.finite import require_finite
from fsdp_qlora.load.safetensors import SafetensorsFolder, TensorEntry
from fsdp_qlora.load.stored import packed_format
from fsdp_qlora.load.stream import fill_alone
from fsdp_qlora.load.weights import minus
from fsdp_qlora.model.skeleton import read_shapes
from fsdp_qlora.quant.formats import Packed
from fsdp_qlora.shapes.linears import LinearShape, ModelShapes, edge_shapes
from fsdp_qlora.shapes.tokens import tables_of_tokens

BYTES_A_WEIGHT = 16
"""Bytes that folding takes for each weight of a linear: as stored, in float32 twice, and PEFT's product."""
BYTES_A_STACKED_WEIGHT = 8
"""Bytes that folding takes for each weight of stacked experts, as stored and in float32, beside those that are folded
at once."""


@dataclass(frozen=True)
class _Place:
    """Where a stored tensor belongs: a range of the flattened values of a tensor of the model."""

    parameter: str
    start: int
    stop: int


class Folding:
    """The weights of a base model after folding."""

    def __init__(
        self, base: PreTrainedModel, files: SafetensorsFolder, adapter: StoredAdapter, packed: Sequence[Packed],
        ranks: Ranks,
    ) -> None:  # fmt: skip
        """Find out which stored tensors change.

        Args:
            base: the base model on meta; its dtype is that of the trained model.
            files: its weights, arranged for ``base``.
            adapter: what is folded in.
            packed: the weights to fold into as they are after quantizing; others are folded into as they are stored.
            ranks: one rank, on the device that quantizes.

        Raises:
            ModelError: if a linear, or stacked weights, with an adapter are not in the model, or a changed tensor
                cannot be written back.
        """
        self.base, self.files, self.adapter, self._ranks = base, files, adapter, ranks
        self.dtypes = {name: parameter.dtype for name, parameter in base.named_parameters()}
        """Dtype of each parameter in the model, by name."""
        shapes = read_shapes(base)
        self._formats = {x.linear.parameter: x for x in packed}
        self._linears = {x.parameter: x for x in shapes.linears} | {x.linear.parameter: x.linear for x in packed}
        apart = {shapes.embedding, shapes.head}.intersection(adapter.modules)
        self._linears |= {x.parameter: x for x in (edge_shapes(shapes) if apart and shapes.edges_apart else ())}
        names = {x.name: x for x in self._linears.values() if not x.stacked}
        if shapes.tied and apart:
            raise ModelError(
                f"what=merged: {adapter.folder} adapts {min(apart)}, whose table embedding and head share in this base "
                "model; folded into it, the adapter would change both. Export the adapter (what=adapter)."
            )
        if missing := sorted(set(adapter.modules) - names.keys()):
            raise ModelError(f"adapter: {adapter.folder} adapts {missing[0]}, which is no linear of this base model.")
        self._stacks = {x.name: x for x in shapes.linears if x.stacked and x.name in adapter.stacks}
        """Stacked weights with an adapter, in the model's order."""
        if missing := sorted(set(adapter.stacks) - self._stacks.keys()):
            raise ModelError(f"adapter: {adapter.folder} adapts {missing[0]}, which this base model does not stack.")
        self._sizes = {name: (names[name].out_features, names[name].in_features) for name in adapter.modules}
        adapter.require_fits(self._sizes, self._stacks.values())
        self._adapted = {f"{name}.weight": name for name in adapter.modules}
        self._whole = self._trained_whole(shapes)
        self._shapes = shapes.parameters
        self._rows = {f"{name}.weight": rows for name, rows in self._token_rows(shapes)}
        self._first = min(adapter.config.token_ids, default=0)
        for table in self._rows:
            self._linears.setdefault(table, _as_linear(table, shapes))
        self.places = dict(self._places(shapes))
        """Stored tensor -> its place in a changed tensor of the model."""
        self._last: tuple[str, torch.Tensor] | None = None

    @property
    def num_ids(self) -> int | None:
        """Rows of embedding and head in the result if tokens were added, which are the last ones; else None."""
        ids = self.adapter.config.token_ids
        return max(ids) + 1 if ids else None

    @property
    def largest_bytes(self) -> int:
        """Bytes that the largest changed tensor takes while it is folded."""
        changed = {place.parameter for place in self.places.values()}
        return max(map(self._bytes_of, changed), default=0)

    def _bytes_of(self, parameter: str) -> int:
        linear = self._linears.get(parameter)
        return BYTES_A_WEIGHT * prod(self._shapes[parameter]) if linear is None else _bytes_of_folding(linear)

    def _trained_whole(self, shapes: ModelShapes) -> frozenset[str]:
        """Return the parameters that the adapter's file holds whole, each once."""
        names = set(self.adapter.whole_parameters)
        tables = [f"{name}.weight" for name in (shapes.embedding, shapes.head)]
        if shapes.tied and names.issuperset(tables) and torch.equal(*map(self.adapter.whole, tables)):
            names.discard(tables[1])
        if missing := sorted(names - shapes.parameters.keys()):
            raise ModelError(
                f"adapter: {self.adapter.folder} trained {missing[0]}, which this base model does not have, or not "
                "apart from the embedding."
            )
        return frozenset(names)

    def _token_rows(self, shapes: ModelShapes) -> Iterator[tuple[str, torch.Tensor]]:
        ids = sorted(self.adapter.config.token_ids)
        if not ids:
            return
        if ids != list(range(ids[0], ids[-1] + 1)) or ids[0] > shapes.embedding_rows:
            raise ModelError(
                f"adapter: {self.adapter.folder} trained rows of tokens that this base model has already, or leaves a "
                f"gap after its {shapes.embedding_rows} rows; only rows of added tokens can be merged."
            )
        for table in tables_of_tokens(shapes):
            rows = self.adapter.token_rows(table)
            if rows is None or rows.shape != (len(ids), shapes.hidden_size):
                raise ModelError(f"adapter: {self.adapter.folder} lacks rows of {table} for {len(ids)} added tokens.")
            yield table, rows

    def _places(self, shapes: ModelShapes) -> Iterator[tuple[str, _Place]]:
        whole = dict.fromkeys(sorted(self._whole))
        for parameter in {**self._adapted, **self._stacks, **self._formats, **self._rows, **whole}:
            shape, start = shapes.parameters[parameter], 0
            if packed_format(self.files, parameter):
                yield parameter, _Place(parameter, 0, prod(shape))
                continue
            stored = self.files.find(parameter, shape)
            if stored.make is not None:
                raise ModelError(
                    f"what=merged: {parameter} is stored in another form in {stored.file}, which cannot be written "
                    "back; export the adapter (what=adapter) and merge it with PEFT."
                )
            for part in stored.parts:
                yield part.name, _Place(parameter, start, start + part.numel)
                start += part.numel
            head = f"{shapes.head}.weight"
            if shapes.tied and parameter == f"{shapes.embedding}.weight" and head in self.files.entries:
                yield head, _Place(parameter, 0, prod(shape))  # a stored copy of the tied table

    def shape(self, entry: TensorEntry) -> tuple[int, ...]:
        """Return the shape of a stored tensor in the result."""
        place = self.places.get(entry.name)
        if place is not None and place.parameter in self._rows:
            return (self.num_ids or 0, *entry.shape[1:])
        if place is not None and packed_format(self.files, entry.name):
            return self._shapes[place.parameter]
        return entry.shape

    def values(self, entry: TensorEntry) -> torch.Tensor:
        """Return the values of a changed stored tensor, in the base's dtype or float32, in any shape."""
        place = self.places[entry.name]
        if self._last is None or self._last[0] != place.parameter:
            self._last = None  # before the next one is made
            self._last = (place.parameter, self._value(place.parameter))
        value = self._last[1]
        return value if place.parameter in self._rows else value.reshape(-1)[place.start : place.stop]

    def _value(self, parameter: str) -> torch.Tensor:
        if parameter in self._whole:
            value = self.adapter.whole(parameter)
            if value.shape != self._shapes[parameter]:
                raise ModelError(
                    f"adapter: {parameter} is {list(value.shape)} in {self.adapter.folder}, but "
                    f"{list(self._shapes[parameter])} in this base model."
                )
            return value
        linear = self._linears[parameter]
        weight = self._before(parameter, linear)
        if (rows := self._rows.get(parameter)) is not None:
            return torch.cat([weight[: self._first], rows.to(weight.dtype)])
        if parameter in self._stacks:
            return self.adapter.fold_stack(linear, weight, self._stacks.values())
        if parameter not in self._adapted:
            return weight
        weight = weight.t() if linear.transposed else weight
        folded = self.adapter.fold(self._adapted[parameter], weight, self._sizes)
        return folded.t().contiguous() if linear.transposed else folded

    def _before(self, parameter: str, linear: LinearShape) -> torch.Tensor:
        """Return a weight before folding, in its stored shape: as it was in training if it is in ``packed``."""
        taken = self.adapter.taken(linear.name)
        if (packed := self._formats.get(parameter)) is not None:
            module = fill_alone(packed, self.files, self._ranks, taken)
            if not linear.stacked:
                weight = module.dequantize(self.base.dtype).cpu()
                return weight.t().contiguous() if linear.transposed else weight
            weight = torch.empty(linear.stored_shape, dtype=self.base.dtype)
            for index, place in enumerate(weight):
                matrix = module.dequantize(self.base.dtype, index)
                place.copy_(matrix.t() if linear.transposed else matrix)
            return weight
        stored = self.files.find(parameter, linear.stored_shape)
        weight = self.files.read(stored, 0, stored.numel).view(linear.stored_shape)
        require_finite(weight, f"{stored.file}: tensor {parameter}")
        if taken is not None:
            weight = minus(weight.float(), taken.transposed() if linear.transposed else taken)
        return weight


def _bytes_of_folding(linear: LinearShape) -> int:
    if not linear.stacked:
        return BYTES_A_WEIGHT * linear.numel
    at_once = max(piece.stop - piece.start for piece in pieces_of(linear)) * linear.numel_each
    return BYTES_A_STACKED_WEIGHT * linear.numel + BYTES_A_WEIGHT * at_once


def _as_linear(table: str, shapes: ModelShapes) -> LinearShape:
    rows, columns = shapes.parameters[table]
    return LinearShape(table.removesuffix(".weight"), rows, columns)
