"""Memory that a decoder layer keeps for backward, by arithmetic over its linears: an upper bound.

Autograd saves the following in transformers' decoder layers with our 4-bit linears, which themselves save only their
input, and only if they have an adapter:

- norms: the input in float32 (transformers' RMSNorm computes in float32);
- each group of linears with the same parent (attention, MLP): the input they share, for the adapters' A; the outputs of
  all but the last, which feed attention or the activation function; the input of the last; in an MLP also the
  activation function's output;
- eager attention: keys and values repeated for each head, the float32 softmax and its copy; blockwise attention: the
  probabilities of short sequences;
- sdpa with a mask, which rows whose positions restart need: keys and values repeated for each head, and in each layer
  the mask in the queries' dtype; sdpa in float32 with grouped heads, for which GPUs have no kernel: the same, and the
  scores in place of the mask;
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

    tensors: tuple[int, ...]
    """Each tensor kept from the (re)computed forward until backward."""
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
    output_again: int
    """Attention's output, if a kernel and the adapter after it save it in two shapes: two copies in host memory."""
    kept_positions: int
    """For each position of the row: sdpa's mask, or its scores where it has no kernel."""

    @property
    def saved(self) -> int:
        """Sum of ``tensors``."""
        return sum(self.tensors)


def is_attention(parent: str) -> bool:
    """Whether a module's name marks it as attention."""
    return "attn" in parent.lower() or "attention" in parent.lower()


def layer_activations(
    shapes: ModelShapes, layer: str, adapted: frozenset[str], itemsize: int, dropout: bool, attention: str,
    masked: bool = False, on_accelerator: bool = False,
) -> LayerActivations:  # fmt: skip
    """Return the bytes per token that the decoder layer named ``layer`` keeps.

    Args:
        shapes: the model.
        layer: name of the layer.
        adapted: names of the linears with an adapter.
        itemsize: bytes per activation element.
        dropout: whether the adapters use dropout (each then keeps its own dropped input and a mask, and no other).
        attention: its implementation. ``eager`` keeps the scores, ``blockwise`` keeps them for short sequences;
            ``varlen`` on a CPU computes them in blocks as well.
        masked: whether sdpa gets a mask.
        on_accelerator: whether the layer runs on a GPU.
    """
    eager, blocks = attention == "eager", attention in ("blockwise", "varlen") and not on_accelerator
    by_operations = attention == "sdpa" and on_accelerator and itemsize == FLOAT32 and not masked
    repeats, keeps_scores = eager or by_operations or (attention == "sdpa" and masked), eager
    inside = [x for x in shapes.linears if x.name.startswith(layer + ".")]
    groups: dict[str, list[LinearShape]] = {}
    for x in inside:
        groups.setdefault(x.name.rpartition(".")[0], []).append(x)
    tensors: list[int] = []
    in_kernel = on_accelerator and not (eager or by_operations)
    output_again = transient = width = attending = 0
    for parent, group in groups.items():
        times = shapes.experts_per_token if group[0].count > 1 else 1
        repeated = _repeated(parent, group) if repeats else 0
        saved, keeps_scores = _group(parent, group, adapted, dropout), keeps_scores or (by_operations and repeated > 0)
        if repeated:
            saved[1:3] = saved[1] + repeated, saved[2] + repeated
        tensors += [times * elements * itemsize for elements in saved]
        # experts: three more tensors as wide as the output: the sorted copy, the outputs and the weighted outputs
        transient = max(transient, times * (3 * group[-1].out_features if times > 1 else group[-1].in_features))
        if is_attention(parent):
            width = max(width, group[-1].in_features)
            attending += sum(saved)
            output_again += group[-1].in_features if in_kernel and group[-1].name in adapted and not dropout else 0
    if dropout:  # the dropped input and a mask, which CPUs keep in the input's dtype
        mask = 1 if on_accelerator else itemsize
        tensors += [x.in_features * size for x in inside if x.name in adapted for size in (itemsize, mask)]
    heads = shapes.num_attention_heads if keeps_scores else 0
    attention_mask = itemsize if attention == "sdpa" and masked and width else 0
    return LayerActivations(
        tensors=(*tensors, *_norms(shapes, layer, inside)),
        transient=(transient + shapes.hidden_size) * itemsize,
        attention_saved=(attending + shapes.hidden_size) * itemsize + shapes.hidden_size * FLOAT32,
        attention_scores=heads * 3 * FLOAT32,
        attention_width=width,
        # outputs of all linears (of experts: those of the experts a token goes through) and of attention
        chosen=(
            sum(shapes.experts_per_token * x.out_features if x.count > 1 else x.out_features for x in inside) + width
        )
        * itemsize,
        output_again=output_again * itemsize,
        blocks=3 * shapes.num_attention_heads * QUERY_BLOCK * itemsize if blocks else 0,
        kept_positions=attention_mask if eager or not keeps_scores else heads * FLOAT32,
    )


def _group(parent: str, group: list[LinearShape], adapted: frozenset[str], dropout: bool) -> list[int]:
    """Return the elements per token of each tensor that the linears of one module keep, the outputs first."""
    *front, last = group
    if last.count > 1:  # outputs are kept because each is weighted; inputs only for adapters
        inputs = [x.in_features for x in group if x.name in adapted]
        return [*(x.out_features for x in group), last.in_features, *inputs]
    elements = [x.out_features for x in front]
    if dropout:  # adapters save dropped copies, which are counted elsewhere
        adapted = frozenset()
    if front and any(x.name in adapted for x in front):
        elements.append(front[0].in_features)
    attention = is_attention(parent)
    # The last linear's input: attention saves it as its own output, elsewhere only an adapter needs it. An MLP also
    # saves the activation function's output, which is as wide.
    if attention or last.name in adapted:
        elements.append(last.in_features)
    return elements if attention else [*elements, last.in_features]


def _repeated(parent: str, group: list[LinearShape]) -> int:
    """Return the elements per token by which keys, and values, grow if they are repeated to the queries' width."""
    *front, _ = group
    if not is_attention(parent) or len(front) != 3:  # q, k, v
        return 0
    widths = [x.out_features for x in front]
    return max(widths) - min(widths)


def _norms(shapes: ModelShapes, layer: str, inside: Iterable[LinearShape]) -> list[int]:
    """Return the bytes per token of each norm's float32 input."""
    inputs = {x.name.rpartition(".")[2]: x.out_features for x in inside}
    widths = []
    for name, shape in shapes.parameters.items():
        if not name.startswith(layer + ".") or len(shape) != 1 or not name.endswith("norm.weight"):
            continue
        if shape[0] == shapes.hidden_size:
            widths.append(shape[0])
        else:  # a norm over the queries or keys of each head
            widths.append(inputs.get(name.split(".")[-2].replace("_norm", "_proj"), shape[0]))
    return [width * FLOAT32 for width in widths]
