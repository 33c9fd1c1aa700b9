"""What a decoder layer keeps for backward, by arithmetic over its linears: the upper case, all tokens supervised.

What autograd saves in transformers' decoder layers with our 4-bit linears (which save their input where they have an
adapter, and nothing else):

- each norm: its input in float32 (transformers' RMSNorm computes in float32);
- each group of linears with one parent (attention, MLP): the input they share, for the adapters' A; the outputs of all
  but the last, which feed attention or the activation function; the input of the last; in an MLP also the activation
  function's output;
- eager attention: keys and values repeated for each head, the float32 softmax and its copy; blockwise attention: the
  probabilities of short sequences;
- experts: the same once for each expert that a token goes through.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fsdp_qlora.attention.blocks import QUERY_BLOCK
from fsdp_qlora.shapes.linears import FLOAT32, LinearShape, ModelShapes


@dataclass(frozen=True)
class LayerActivations:
    """Bytes that one decoder layer needs, for each token."""

    saved: int
    """Kept between the (re)computed forward and backward."""
    transient: int
    """More than that, for a moment in backward: the gradients of the widest intermediate."""
    attention_saved: int
    """The part of ``saved`` that is still there when attention is differentiated."""
    attention_scores: int
    """As ``scores``, at that moment: the softmax, its gradient and the scores' gradient, all float32."""
    attention_width: int
    """Elements of the attention's output (heads x head size), for counting operations."""
    chosen: int
    """The part of ``saved`` that selective checkpointing keeps: what products and attention gave."""
    blocks: int
    """For each position that a token may see: a block of blockwise attention's scores, with slope and copy."""


def is_attention(parent: str) -> bool:
    """Return whether a module's name says that it is attention."""
    return "attn" in parent.lower() or "attention" in parent.lower()


def layer_activations(
    shapes: ModelShapes, layer: str, adapted: frozenset[str], itemsize: int, dropout: bool, attention: str
) -> LayerActivations:
    """Return what the decoder layer named ``layer`` keeps for each token.

    Args:
        shapes: the model.
        layer: name of the layer.
        adapted: names of the linears with an adapter.
        itemsize: bytes of an activation.
        dropout: whether the adapters drop some of their input (each then keeps its own, and a mask).
        attention: its implementation; ``eager`` keeps the scores, ``blockwise`` does of short sequences. ``varlen``
            on a CPU makes them by blocks, too.
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
        # experts: the sorted copy, the outputs and the weighed ones beside those kept
        transient = max(transient, times * (3 * group[-1].out_features if times > 1 else group[-1].in_features))
        if is_attention(parent):
            width = max(width, group[-1].in_features)
            attending += saved
    extra = 0
    if dropout:
        extra = sum(x.in_features for x in inside if x.name in adapted) * (itemsize + 1)
    heads = shapes.num_attention_heads if eager else 0
    return LayerActivations(
        saved=elements * itemsize + _norms(shapes, layer, inside) + extra,
        transient=(transient + shapes.hidden_size) * itemsize,
        attention_saved=(attending + shapes.hidden_size) * itemsize + shapes.hidden_size * FLOAT32,
        attention_scores=heads * 3 * FLOAT32,
        attention_width=width,
        chosen=(
            sum(shapes.experts_per_token * x.out_features if x.count > 1 else x.out_features for x in inside) + width
        )
        * itemsize,
        blocks=3 * shapes.num_attention_heads * QUERY_BLOCK * itemsize if blocks else 0,
    )


def _group(parent: str, group: list[LinearShape], adapted: frozenset[str], eager: bool) -> int:
    """Return the elements that the linears of one module keep for each token."""
    *front, last = group
    if last.count > 1:  # no adapters, so no inputs; the outputs are kept, as each is weighed
        return sum(x.out_features for x in group) + last.in_features
    elements = sum(x.out_features for x in front)
    if front and any(x.name in adapted for x in front):
        elements += front[0].in_features
    attention = is_attention(parent)
    if attention or last.name in adapted:
        elements += last.in_features
    if not attention:
        elements += last.in_features
    elif eager and len(front) == 3:
        elements += 2 * (max(x.out_features for x in front) - min(x.out_features for x in front))
    return elements


def _norms(shapes: ModelShapes, layer: str, inside: Iterable[LinearShape]) -> int:
    """Return the bytes of the norms' float32 inputs for each token."""
    inputs = {x.name.rpartition(".")[2]: x.out_features for x in inside}
    total = 0
    for name, shape in shapes.parameters.items():
        if not name.startswith(layer + ".") or len(shape) != 1 or not name.endswith("norm.weight"):
            continue
        if shape[0] == shapes.hidden_size:
            total += shape[0]
        else:  # a norm over each head's queries or keys
            total += inputs.get(name.split(".")[-2].replace("_norm", "_proj"), shape[0])
    return total * FLOAT32
