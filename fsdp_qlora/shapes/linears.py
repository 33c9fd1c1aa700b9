"""Shapes of a model and its linears, and which of them can be quantized.

Names and numbers only; no tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from fsdp_qlora.shapes.runs import LayerRun
from fsdp_qlora.shapes.tower import Tower


@dataclass(frozen=True)
class LinearShape:
    """One linear layer ``[out_features, in_features]``, or the stacked matrices of a layer's experts."""

    name: str
    """Name of the layer, or of the stacked parameter."""
    out_features: int
    in_features: int
    bias: bool = False
    count: int = 1
    """Number of stacked matrices; 1 for a layer."""
    transposed: bool = False
    """Whether files hold ``[in_features, out_features]`` (GPT-2's Conv1D, gpt-oss's experts)."""
    stacked: bool = False
    """Whether it is a 3-D parameter rather than a layer."""
    lookup: bool = False
    """Whether it is an embedding, whose ``[out_features, in_features]`` rows are looked up."""

    @property
    def numel_each(self) -> int:
        """Number of weights in each stacked matrix."""
        return self.out_features * self.in_features

    @property
    def numel(self) -> int:
        """Number of weights, without the bias."""
        return self.count * self.numel_each

    @property
    def parameter(self) -> str:
        """Name of the weight in the unquantized model."""
        return self.name if self.stacked else f"{self.name}.weight"

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the weight in the unquantized model and in its files."""
        shape = (self.out_features, self.in_features)
        shape = shape[::-1] if self.transposed else shape
        return (self.count, *shape) if self.stacked else shape


@dataclass(frozen=True)
class ModelShapes:
    """What a plan needs to know about a model; `fsdp_qlora.model.skeleton.read_shapes` reads it from a meta model."""

    parameters: dict[str, tuple[int, ...]]
    """Shape of each parameter, by name; tied parameters appear once."""
    linears: tuple[LinearShape, ...]
    """Every linear layer and stacked expert weight, without embeddings and head."""
    layers: tuple[str, ...]
    """Names of the decoder layers, in order."""
    embedding: str
    """Name of the input embedding module; empty if it is no table."""
    head: str
    """Name of the output head module."""
    tied: bool
    """Whether head and embedding share one weight."""
    hidden_size: int
    vocab_size: int
    num_attention_heads: int
    edges_apart: bool = True
    """Whether embedding and head are their own FSDP units; in an encoder-decoder, or if the head does more than
    multiply, they belong to the root unit."""
    max_positions: int = 0
    """Longest sequence the model supports; 0 if not known."""
    experts_per_token: int = 0
    """Number of experts each token goes through; 0 if there are none."""
    not_adapted: frozenset[str] = frozenset()
    """Linears that get no adapter, because plain PEFT could not load one onto them."""
    float32: frozenset[str] = frozenset()
    """Parameters that upstream keeps in float32 in a 16-bit model; unsharded, because FSDP would round them."""
    left_dense: frozenset[str] = frozenset()
    """Parameters that upstream's own quantization leaves dense: convolutions, and what it keeps in float32 in float16
    models (T5's ``wo``)."""
    beside: frozenset[str] = frozenset()
    """Linears outside the decoder layers that get an adapter if a pattern names them: those of a vision tower."""
    tower: Tower | None = None
    """What reads images among the decoder's tokens, if anything does."""
    capped: bool = False
    """Whether logits have a soft cap, whose derivative the loss keeps beside them."""
    recomputes: bool = True
    """Whether its class can recompute layers in backward."""
    by_code: bool = False
    """Whether upstream's own code runs on the logits (BART adds a bias), which makes more of them."""
    runs: tuple[LayerRun, ...] = ()
    """What each of ``layers`` takes for a row (`fsdp_qlora.model.runs`); none where arithmetic tells."""

    @property
    def embedding_rows(self) -> int:
        """Number of rows of the embedding; token ids must be below it. 0 without one: images have no tokens' ids."""
        return self.parameters[f"{self.embedding}.weight"][0] if self.embedding else 0

    def longest(self, max_length: int) -> int:
        """Return the length of the longest rows: those of other objectives are cut where the model's positions end."""
        return min(max_length, self.max_positions or max_length) if self.runs else max_length

    @property
    def float32_bytes(self) -> int:
        """Bytes of the parameters that every rank holds whole, in float32."""
        return 4 * sum(prod(self.parameters[name]) for name in self.float32)

    def numel(self, prefix: str) -> int:
        """Return the number of parameters under the module ``prefix``."""
        return sum(prod(s) for name, s in self.parameters.items() if name.startswith(prefix + "."))


def quantized_linears(shapes: ModelShapes) -> tuple[LinearShape, ...]:
    """Return the linears that can be quantized: all inside the decoder layers."""
    return tuple(x for x in shapes.linears if any(x.name.startswith(layer + ".") for layer in shapes.layers))


def quantized_edges(shapes: ModelShapes) -> tuple[LinearShape, ...]:
    """Return the tables of embedding and head to quantize: one if they are tied, else two."""
    names = (shapes.embedding,) if shapes.tied else (shapes.embedding, shapes.head)
    return tuple(LinearShape(name, shapes.vocab_size, shapes.hidden_size) for name in names)


def edge_shapes(shapes: ModelShapes) -> tuple[LinearShape, LinearShape]:
    """Return embedding and head of a causal language model."""
    rows, width = shapes.parameters[f"{shapes.embedding}.weight"]
    vocab, _ = (rows, width) if shapes.tied else shapes.parameters[f"{shapes.head}.weight"]
    bias = f"{shapes.head}.bias" in shapes.parameters
    return LinearShape(shapes.embedding, rows, width, lookup=True), LinearShape(shapes.head, vocab, width, bias)


FLOAT32 = 4
