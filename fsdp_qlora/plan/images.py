"""Memory that a vision tower takes for the images of a micro-batch, by arithmetic over its linears: an upper bound.

Counted are as many images as a row has room for (or as its data have), in each row of the micro-batch:

- during the whole step: the pixels in float32;
- while the decoder computes: the pixels in the compute dtype, the states that upstream's output holds, and the features
  in the decoder's width, twice;
- while the tower computes: in addition the most that one block holds at a time, with eager attention its scores;
- what is kept for backward, if adapters train the tower: the outputs that attention and the activation function save,
  the norms' inputs and the adapters' own, in all blocks from the first with an adapter on; with
  ``train.activation_checkpointing=full`` each block's input only, as its blocks are recomputed like the decoder's.

In addition each rank holds the tower's weights whole during a step, since they belong to FSDP's root unit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fsdp_qlora.adapters.saved import Kept
from fsdp_qlora.plan.activations import is_attention
from fsdp_qlora.plan.storage import StorageSettings
from fsdp_qlora.shapes.linears import FLOAT32, LinearShape, ModelShapes
from fsdp_qlora.shapes.tower import Tower

_NORMS, _STATISTICS = 2, 2 * FLOAT32
"""Norms of a block, and what each keeps of a patch besides its input: mean and deviation."""
_ROTATED = 6
"""Tensors in float32, as wide as a block, that exist while queries and keys are rotated."""


class TowerMemory:
    """Adds up what the tower takes, for any batch and storage settings; nothing for models without one.

    Args:
        shapes: the model.
        trained: names of the modules with trained tensors.
        kept: what the adapter of each linear of the tower keeps in addition, by its name.
    """

    def __init__(self, shapes: ModelShapes, trained: Iterable[str], kept: Mapping[str, Kept]) -> None:
        self._tower, self._hidden = shapes.tower, shapes.hidden_size
        self._trained, self._kept = frozenset(trained), kept
        blocks = () if self._tower is None else self._tower.blocks
        outside = [x for x in shapes.linears if x.name in shapes.beside]
        self._block = [x for x in outside if blocks and x.name.startswith(f"{blocks[0]}.")]
        inside = tuple(f"{block}." for block in blocks)
        # SigLIP's pooling head has a row for each image, not for each token
        self._after = [x for x in outside if not x.name.startswith(inside) and ".head." not in x.name]
        self._from = _first_trained(shapes, blocks, self._trained)
        """The number of the first block that keeps anything for backward; of all blocks if none does."""
        beside = {*shapes.beside, *(name.rpartition(".")[0] for name in _outside(shapes))}
        self.trained = bool(beside & self._trained)
        """Whether anything of it is trained."""

    def pixels(self, settings: StorageSettings) -> int:
        """Return the bytes of a micro-batch's pixels, in float32."""
        return 0 if self._tower is None else self._sizes(self._tower, settings)[0] * self._tower.patch_inputs * FLOAT32

    def held(self, settings: StorageSettings) -> int:
        """Return the bytes that exist from the tower's forward until the head's."""
        if (tower := self._tower) is None:
            return 0
        patches, tokens = self._sizes(tower, settings)
        cast = settings.itemsize if settings.itemsize < FLOAT32 else 0
        pixels = patches * tower.patch_inputs * cast
        states = (tower.states + 1) * patches * tower.width * settings.itemsize
        return pixels + states + 2 * tower.features * tokens * self._hidden * settings.itemsize

    def saved(self, settings: StorageSettings) -> int:
        """Return the bytes that are kept for backward."""
        if (tower := self._tower) is None or not self.trained:
            return 0
        patches, tokens = self._sizes(tower, settings)
        of_block = patches * tower.width * settings.itemsize
        if settings.checkpointing != "full":
            of_block = self._of_block(tower, settings)
        after = sum(x.in_features + x.out_features for x in self._after) * tokens
        rotary = 2 * FLOAT32 * tower.width // tower.num_heads if tower.rotary else 0
        ends = patches * (tower.width * self._norm(tower, settings) + _STATISTICS + rotary)
        more = self._of_adapters(self._after, tokens, settings)
        return (len(tower.blocks) - self._from) * of_block + after * settings.itemsize + ends + more

    def in_forward(self, settings: StorageSettings) -> int:
        """Return the most bytes that exist beside `held` and `saved` while the tower computes."""
        if (tower := self._tower) is None:
            return 0
        patches, tokens = self._sizes(tower, settings)
        norm = tower.width * (2 * FLOAT32 if tower.float32_norms else settings.itemsize)
        moments = [patches * (3 * tower.width * settings.itemsize + norm)]
        for parent, group in _by_parent(self._block).items():
            elements = sum(x.out_features for x in group[:-1]) + (2 + tower.gated) * group[-1].in_features
            scores = 0
            if is_attention(parent):
                elements += group[-1].in_features
                elements += _ROTATED * tower.width * FLOAT32 // settings.itemsize if tower.rotary else 0
                scores = self._scores(tower, settings, 2 * settings.itemsize + 2 * FLOAT32)
            moments.append(patches * (elements + 2 * tower.width) * settings.itemsize + scores)
        kept = self._scores(tower, settings, settings.itemsize)  # upstream's blocks hold the scores until they end
        after = max((x.in_features + 2 * x.out_features for x in self._after), default=0)
        placed = settings.tokens * self._hidden * (2 * settings.itemsize + 1)  # the embeddings with features in place
        return max(max(moments) + kept, tokens * after * settings.itemsize, placed)

    def in_backward(self, settings: StorageSettings) -> int:
        """Return the most bytes that exist beside `saved` while the tower is differentiated."""
        if (tower := self._tower) is None or not self.trained:
            return 0
        patches, tokens = self._sizes(tower, settings)
        after = max((x.in_features + 2 * x.out_features for x in self._after), default=0) * tokens * settings.itemsize
        if self._from == len(tower.blocks):
            return after
        widest = max((x.in_features + x.out_features for x in self._block), default=0)
        again = self._of_block(tower, settings) if settings.checkpointing == "full" else 0
        rotated = _ROTATED * tower.width * FLOAT32 if tower.rotary else 0
        own = patches * ((2 * widest + 2 * tower.width) * settings.itemsize + rotated)
        return max(after, again + own + self._scores(tower, settings, 3 * FLOAT32))

    def operations(self, settings: StorageSettings) -> float:
        """Return the operations for the images of a micro-batch, as `timing` counts them.

        A block takes ``2 N + S`` for a patch, N being its weights and ``S = 4 x width x patches of the image``:
        attention in both directions. Backward takes ``2 N + 2.5 S`` in the blocks from the first trained one on.
        """
        if (tower := self._tower) is None:
            return 0.0
        patches, tokens = self._sizes(tower, settings)
        weights = 2 * sum(x.numel for x in self._block)
        scores = 4 * tower.width * tower.longest(settings.max_length)
        after = 2 * sum(x.numel for x in self._after) * tokens
        forward = len(tower.blocks) * patches * (weights + scores) + after
        if not self.trained:
            return forward
        again = weights + scores if settings.checkpointing == "full" else 0
        return forward + (len(tower.blocks) - self._from) * patches * (weights + 2.5 * scores + again) + after

    def _of_block(self, tower: Tower, settings: StorageSettings) -> int:
        """Return the bytes that one block keeps for backward, with an adapter where any block has one."""
        patches, _ = self._sizes(tower, settings)
        adapted = {x.name for x in self._block if self._is_trained(x, tower)}
        dropped, eager = settings.lora.dropout > 0, settings.attention == "eager"
        elements = 0
        for parent, (*front, last) in _by_parent(self._block).items():
            elements += sum(x.out_features for x in front)
            elements += front[0].in_features if any(x.name in adapted for x in front) and not dropped else 0
            if is_attention(parent):  # its output, and queries and keys once they are rotated
                elements += last.in_features + (2 * tower.width if tower.rotary else 0)
                if tower.rotary and last.name in adapted and not eager:  # the outputs of all images in one tensor
                    elements += last.in_features
            else:
                elements += last.in_features * (tower.gated + (last.name in adapted and not dropped))
        mask = 1 if settings.on_accelerator else settings.itemsize
        masks = sum(x.in_features * (settings.itemsize + mask) for x in self._block if x.name in adapted and dropped)
        norms = _NORMS * (tower.width * self._norm(tower, settings) + _STATISTICS)
        cast = settings.itemsize if settings.itemsize < FLOAT32 else 0
        scores = self._scores(tower, settings, FLOAT32 + cast)
        of_heads = 0 if eager else tower.num_heads * FLOAT32
        return (
            patches * (elements * settings.itemsize + masks + norms + of_heads)
            + scores * (settings.micro_batch_size if not tower.image_patches else 1)
            + self._of_adapters([x for x in self._block if x.name in adapted], patches, settings)
        )  # fmt: skip

    def _is_trained(self, linear: LinearShape, tower: Tower) -> bool:
        """Whether this linear of the first block, or the same one of another block, is trained."""
        end = linear.name.removeprefix(tower.blocks[0])
        return any(f"{block}{end}" in self._trained for block in tower.blocks)

    def _of_adapters(self, linears: Iterable[LinearShape], rows: int, settings: StorageSettings) -> int:
        own = [self._kept[x.name] for x in linears if x.name in self._kept]
        return sum((fixed + a_token * rows) * settings.itemsize for kept in own for fixed, a_token in kept.each)

    def _scores(self, tower: Tower, settings: StorageSettings, itemsize: int) -> int:
        """Return the bytes of eager attention's scores: of all images of one size, else of the largest image."""
        if settings.attention != "eager":
            return 0
        longest = tower.longest(settings.max_length)
        rows = settings.micro_batch_size * tower.patches(settings.max_length) if tower.image_patches else longest
        return tower.num_heads * longest * rows * itemsize

    @staticmethod
    def _norm(tower: Tower, settings: StorageSettings) -> int:
        return FLOAT32 if tower.float32_norms else settings.itemsize

    @staticmethod
    def _sizes(tower: Tower, settings: StorageSettings) -> tuple[int, int]:
        """Return the most patches and tokens of images in a micro-batch."""
        rows, length = settings.micro_batch_size, settings.max_length
        return rows * tower.patches(length), rows * tower.tokens(length)


def _by_parent(linears: Iterable[LinearShape]) -> dict[str, list[LinearShape]]:
    groups: dict[str, list[LinearShape]] = {}
    for x in linears:
        groups.setdefault(x.name.rpartition(".")[0], []).append(x)
    return groups


def outside_units(shapes: ModelShapes) -> list[str]:
    """Return the parameters of the root unit: outside the decoder's layers, the embedding and the head."""
    units = tuple(f"{name}." for name in (*shapes.layers, shapes.embedding, shapes.head) if name)
    return [name for name in shapes.parameters if not name.startswith(units)]


def _outside(shapes: ModelShapes) -> list[str]:
    """Return the parameters that images alone reach."""
    decoder = shapes.embedding.rpartition(".")[0]
    return [name for name in outside_units(shapes) if not name.startswith(f"{decoder}.")]


def _first_trained(shapes: ModelShapes, blocks: tuple[str, ...], trained: frozenset[str]) -> int:
    """Return the number of the first block behind something trained: the model's order is that of its forward."""
    before = []
    for name in _outside(shapes) if blocks else ():
        if name.startswith(f"{blocks[0]}."):
            break
        before.append(name.rpartition(".")[0])
    if trained.intersection(before):
        return 0
    return next((n for n, b in enumerate(blocks) if any(name.startswith(f"{b}.") for name in trained)), len(blocks))
