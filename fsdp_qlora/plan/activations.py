"""Memory that a decoder layer keeps for backward, by arithmetic over its linears: an upper bound.

Autograd saves the following in transformers' decoder layers with our 4-bit linears, which themselves save only their
input, and only if they have an adapter:

- norms: the input in float32 (transformers' RMSNorm computes in float32);
- each group of linears with the same parent (attention, MLP): the input they share, for the adapters' A; the outputs of
  all but the last, which feed attention or the activation function; the input of the last; in an MLP also the
  activation function's output;
- eager attention: keys and values repeated for each head, the float32 softmax and its copy; blockwise attention: the
  probabilities of short sequences;
- experts: the same, once for each expert that a token goes through.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fsdp_qlora.attention.blocks import QUERY_BLOCK
from fsdp_qlora.shapes.linears import FLOAT32, LinearShape, ModelShapes


@dataclass(frozen=True)
class LayerActivations:
    """Bytes per token that one decoder layer needs."""

    saved: int
    """Kept from the (re)computed forward until backward."""
    transient: int
    """Needed on top of ``saved`` at the peak of backward: the gradients of the widest intermediate."""
    attention_saved: int
    """The part of ``saved`` that is still alive in attention's backward."""
    attention_scores: int
    """For each position a token may see, at that moment: softmax, its gradient and the scores' gradient, in float32."""
    attention_width: int
    """Width of attention's output (heads x head size), for counting operations."""
    chosen: int
    """The part of ``saved`` that selective checkpointing keeps: the outputs of products and attention."""
    blocks: int
    """For each position of a row, not each token: a block of blockwise attention's scores, gradient and copy."""


def is_attention(parent: str) -> bool:
    """Whether a module's name marks it as attention."""
    return "attn" in parent.lower() or "attention" in parent.lower()


def layer_activations(
    shapes: ModelShapes, layer: str, adapted: frozenset[str], itemsize: int, dropout: bool, attention: str
) -> LayerActivations:
    """Return the bytes per token that the decoder layer named ``layer`` keeps.

    Args:
        shapes: the model.
        layer: name of the layer.
        adapted: names of the linears with an adapter.
        itemsize: bytes per activation element.
        dropout: whether the adapters use dropout (each then keeps its own dropped input and a mask).
        attention: its implementation. ``eager`` keeps the scores, ``blockwise`` keeps them for short sequences;
            ``varlen`` on a CPU computes them in blocks as well.
    """
    eager, blocks = attention == "eager", attention in ("blockwise", "varlen")
    inside = [x for x in shapes.linears if x.name.startswith(layer + ".")]
    groups: dict[str, list[LinearShape]] = {}
    for x in inside:
        groups.setdefault(x.name.rpartition(".")[0], []).append(x)
    elements = transient = width = attending = 0
    for parent, group in groups.items():
        times = shapes.experts_per_token if group[0].count > 1 else 1
        saved = _group(parent, group, adapted, eager)
        elements += times * saved
        # experts: three more tensors as wide as the output: the sorted copy, the outputs and the weighted outputs
        transient = max(transient, times * (3 * group[-1].out_features if times > 1 else group[-1].in_features))
        if is_attention(parent):
            width = max(width, group[-1].in_features)
            attending += saved
    extra = 0
    if dropout:
        extra = sum(x.in_features for x in inside if x.name in adapted) * (itemsize + 1)  # + 1: the mask
    heads = shapes.num_attention_heads if eager else 0
    return LayerActivations(
        saved=elements * itemsize + _norms(shapes, layer, inside) + extra,
        transient=(transient + shapes.hidden_size) * itemsize,
        attention_saved=(attending + shapes.hidden_size) * itemsize + shapes.hidden_size * FLOAT32,
        attention_scores=heads * 3 * FLOAT32,
        attention_width=width,
        # outputs of all linears (of experts: those of the experts a token goes through) and of attention
        chosen=(
            sum(shapes.experts_per_token * x.out_features if x.count > 1 else x.out_features for x in inside) + width
        )
        * itemsize,
        blocks=3 * shapes.num_attention_heads * QUERY_BLOCK * itemsize if blocks else 0,
    )


def _group(parent: str, group: list[LinearShape], adapted: frozenset[str], eager: bool) -> int:
    """Return the elements per token that the linears of one module keep."""
    *front, last = group
    if last.count > 1:  # no adapters, so no inputs; outputs are kept because each is weighted
        return sum(x.out_features for x in group) + last.in_features
    elements = sum(x.out_features for x in front)
    if front and any(x.name in adapted for x in front):
        elements += front[0].in_features
    attention = is_attention(parent)
    # The last linear's input: attention saves it as its own output, elsewhere only an adapter needs it. An MLP also
    # saves the activation function's output, which is as wide.
    if attention or last.name in adapted:
        elements += last.in_features
    if not attention:
        elements += last.in_features
    elif eager and len(front) == 3:  # q, k, v: keys and values, repeated to the width of the queries
        elements += 2 * (max(x.out_features for x in front) - min(x.out_features for x in front))
    return elements


def _norms(shapes: ModelShapes, layer: str, inside: Iterable[LinearShape]) -> int:
    """Return the bytes per token of the norms' float32 inputs."""
    inputs = {x.name.rpartition(".")[2]: x.out_features for x in inside}
    total = 0
    for name, shape in shapes.parameters.items():
        if not name.startswith(layer + ".") or len(shape) != 1 or not name.endswith("norm.weight"):
            continue
        if shape[0] == shapes.hidden_size:
            total += shape[0]
        else:  # a norm over the queries or keys of each head
            total += inputs.get(name.split(".")[-2].replace("_norm", "_proj"), shape[0])
    return total * FLOAT32
