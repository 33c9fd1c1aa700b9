"""Which linears are quantized, in which format, which are trained, and which modules are FSDP units.

Arithmetic only: shapes come in, names and numbers go out.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class LinearShape:
    """One linear layer ``[out_features, in_features]``, or the stacked matrices of a layer's experts."""

    name: str
    """Of the layer, or of the stacked parameter."""
    out_features: int
    in_features: int
    bias: bool = False
    count: int = 1
    """Stacked matrices; 1 for a layer."""
    transposed: bool = False
    """Whether files hold ``[in_features, out_features]`` (GPT-2's Conv1D)."""
    stacked: bool = False
    """Whether it is a 3-D parameter and not a layer: it takes no adapter here."""

    @property
    def numel_each(self) -> int:
        """Number of weights of one of the stacked matrices."""
        return self.out_features * self.in_features

    @property
    def numel(self) -> int:
        """Number of weights, the bias not counted."""
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
    """What a plan needs to know of a model; `fsdp_qlora.model.skeleton.read_shapes` reads it off a meta model."""

    parameters: dict[str, tuple[int, ...]]
    """Every parameter's shape by name; tied ones once."""
    linears: tuple[LinearShape, ...]
    """Every linear layer and stacked expert weight, embeddings and the head not among them."""
    layers: tuple[str, ...]
    """Names of the decoder layers, in their order."""
    embedding: str
    """Name of the input embedding module."""
    head: str
    """Name of the output head module."""
    tied: bool
    """Whether head and embedding share one weight."""
    hidden_size: int
    vocab_size: int
    num_attention_heads: int
    edges_apart: bool = True
    """Whether embedding and head are units of their own; in an encoder-decoder, or where a head does more than
    multiply, they belong to the root."""
    max_positions: int = 0
    """Longest sequence that the model is made for; 0 = not known."""
    experts_per_token: int = 0
    """Experts that each token goes through; 0 = none."""
    not_adapted: frozenset[str] = frozenset()
    """Linears that take no adapter, for plain PEFT could not load it onto them."""
    float32: frozenset[str] = frozenset()
    """Parameters that upstream keeps in float32 in a 16-bit model: whole on every rank, for FSDP would round them."""

    @property
    def embedding_rows(self) -> int:
        """Token ids are below."""
        return self.parameters[f"{self.embedding}.weight"][0]

    @property
    def float32_bytes(self) -> int:
        """Bytes of the parameters that every rank holds whole in float32."""
        return 4 * sum(prod(self.parameters[name]) for name in self.float32)

    def numel(self, prefix: str) -> int:
        """Return the number of parameters under the module ``prefix``."""
        return sum(prod(s) for name, s in self.parameters.items() if name.startswith(prefix + "."))


def quantized_linears(shapes: ModelShapes) -> tuple[LinearShape, ...]:
    """Return the linears that can be quantized: all inside the decoder layers."""
    return tuple(x for x in shapes.linears if any(x.name.startswith(layer + ".") for layer in shapes.layers))


def quantized_edges(shapes: ModelShapes) -> tuple[LinearShape, ...]:
    """Return embedding and head as what is stored of them quantized: one table where they are tied, else two."""
    names = (shapes.embedding,) if shapes.tied else (shapes.embedding, shapes.head)
    return tuple(LinearShape(name, shapes.vocab_size, shapes.hidden_size) for name in names)


FLOAT32 = 4
