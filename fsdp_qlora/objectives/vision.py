"""Families of models that read images among the tokens of a text: what each needs of its processor and its config.

Upstream's processors repeat an image's token in the text. They load video processors too, which need torchvision; so
only the image processor is used here, and the tokens of an image are counted by the same formulas.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from fsdp_qlora.errors import DataError, ModelError, first_line
from fsdp_qlora.objectives.objective import PROBED
from fsdp_qlora.shapes.tower import Tower

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import BaseImageProcessor, PreTrainedConfig

Row = dict[str, torch.Tensor]
IMAGES_OF_A_PROBE = (2, 1, 0)
"""Images in the rows of a check: several, one, none."""
_MOST_PIXELS = 28 * 28 * 1280
"""Pixels that upstream's processor of Qwen2-VL leaves of an image at most, unless its file says otherwise."""
_SIDE = 4
"""Patches along a side of a small model's image, or groups of patches of its window."""


class Family(ABC):
    """A kind of models: how many tokens an image takes, and which inputs it becomes."""

    inputs: ClassVar[tuple[str, ...]] = ("pixel_values",)
    """What the image processor makes that the model reads."""
    marks: ClassVar[str] = ""
    """The model's input that says of each token whether it is of an image; empty if there is none."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config: Any = config
        self.vision: Any = config.vision_config

    def require_fit(self, processor: BaseImageProcessor) -> None:
        """Check that the model takes what its image processor makes.

        Raises:
            ModelError: if it does not.
        """
        for key, wanted in self._agreed().items():
            if getattr(processor, key, None) != wanted:
                raise ModelError(
                    f"model.name: its image processor ({type(processor).__name__}) has {key}="
                    f"{getattr(processor, key, None)}, and its config.json asks for {wanted}. Use the "
                    "preprocessor_config.json that came with the model."
                )

    def _agreed(self) -> dict[str, Any]:
        """Return settings that the image processor must share with the model."""
        return {}

    @abstractmethod
    def tokens(self, made: Mapping[str, torch.Tensor]) -> int:
        """Return the tokens that the model reads for one image, given what the processor made of it."""

    @abstractmethod
    def drawn(self, count: int, draw: torch.Generator) -> tuple[Row, list[int]]:
        """Return inputs for ``count`` random images of a small model, and the tokens of each."""

    def measure(self, processor: BaseImageProcessor, size: tuple[int, int]) -> int:
        """Return the tokens of an image of this size (width, height).

        Raises:
            DataError: if the processor takes none of that size.
        """
        from PIL import Image

        return self.tokens(self.pixels(processor, [Image.new("RGB", size)]))

    def pixels(self, processor: BaseImageProcessor, images: Sequence[Image]) -> Row:
        """Return the model's inputs for images.

        Raises:
            DataError: if the processor does not take them.
        """
        try:
            made = processor(images=list(images), return_tensors="pt")
        except Exception as error:  # an image that is 200 times as wide as high, and whatever else upstream refuses
            raise DataError(f"the model's image processor does not take the image: {first_line(error)}") from error
        return {name: made[name] for name in self.inputs}

    @abstractmethod
    def tower(self, blocks: tuple[str, ...]) -> Tower:
        """Return what a plan needs to know of the vision tower, whose blocks have these names."""

    def largest(self, processor: Mapping[str, Any]) -> int:
        """Return the most tokens of an image, by the settings of its processor (``preprocessor_config.json``)."""
        return self.tower(()).image_tokens

    @abstractmethod
    def shrink(self) -> None:
        """Make the vision tower of a small model's config small, too, and what must agree with it."""

    def probe(self, draw: torch.Generator) -> list[Row]:
        """Return rows of a small model, each alone, ``[1, length]``, with two images, one, and none."""
        token = self.config.image_token_id
        most = min(96, self.config.get_text_config().vocab_size)
        rows: list[Row] = []
        for length, count in zip(PROBED, IMAGES_OF_A_PROBE, strict=True):
            images, tokens = self.drawn(count, draw) if count else ({}, [])
            text = torch.randint(4, most, (length,), generator=draw)
            text[text == token] = 3
            parts = [text[:2], *(x for n in tokens for x in (torch.full((n,), token), text[2:4])), text[4:]]
            ids = torch.cat(parts)[None]
            row = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images}
            rows.append(row | ({self.marks: (ids == token).long()} if self.marks else {}))
        return rows


class Llava(Family):
    """LLaVA 1.5: each image has one size, and a token for each patch of the vision tower."""

    def require_fit(self, processor: BaseImageProcessor) -> None:
        """Check that all images get the size of the vision tower.

        Raises:
            ModelError: if they do not.
        """
        if self.vision.model_type not in ("clip_vision_model", "siglip_vision_model"):
            raise ModelError(
                f"model.name: a LLaVA with a {self.vision.model_type} as its vision tower is not supported; those "
                "with CLIP or SigLIP are."
            )
        from PIL import Image

        wanted = (self.vision.image_size, self.vision.image_size)
        for size in ((80, 50), (50, 90)):
            made = tuple(self.pixels(processor, [Image.new("RGB", size)])["pixel_values"].shape[2:])
            if made != wanted:
                raise ModelError(
                    f"model.name: its image processor ({type(processor).__name__}) makes images of {made[0]} x "
                    f"{made[1]} pixels, and its vision tower takes {wanted[0]} x {wanted[1]}. Use the "
                    "preprocessor_config.json that came with the model."
                )

    def tokens(self, made: Mapping[str, torch.Tensor]) -> int:
        """Return the patches; CLIP's class token counts unless ``vision_feature_select_strategy`` leaves it out."""
        height, width = made["pixel_values"].shape[-2:]
        return self._patches(height, width) - int(self.config.vision_feature_select_strategy == "default")

    def _patches(self, height: int, width: int) -> int:
        """Return the patches of an image, and CLIP's class token."""
        patches = (height // self.vision.patch_size) * (width // self.vision.patch_size)
        return patches + int(self.vision.model_type == "clip_vision_model")

    def tower(self, blocks: tuple[str, ...]) -> Tower:
        """Return that all images have one size."""
        vision, layers = self.vision, self.config.vision_feature_layer
        patches = self._patches(vision.image_size, vision.image_size)
        return Tower(
            blocks, vision.hidden_size, vision.num_attention_heads, vision.num_channels * vision.patch_size**2,
            image_patches=patches,
            image_tokens=patches - int(self.config.vision_feature_select_strategy == "default"),
            gated=vision.hidden_act == "quick_gelu", states=1 if isinstance(layers, int) else len(layers),
        )  # fmt: skip

    def shrink(self) -> None:
        """Make images of four by four patches."""
        self.vision.image_size = _SIDE * self.vision.patch_size

    def drawn(self, count: int, draw: torch.Generator) -> tuple[Row, list[int]]:
        """Return images of the size that the vision tower is built for."""
        size = self.vision.image_size
        made = {"pixel_values": torch.randn(count, self.vision.num_channels, size, size, generator=draw)}
        return made, [self.tokens(made)] * count


class Qwen2VL(Family):
    """Qwen2-VL: images of any size, a token for each group of patches, positions along height and width."""

    inputs = ("pixel_values", "image_grid_thw")
    marks = "mm_token_type_ids"

    def _agreed(self) -> dict[str, Any]:
        vision = self.vision
        return {
            "patch_size": vision.patch_size, "merge_size": vision.spatial_merge_size,
            "temporal_patch_size": vision.temporal_patch_size,
        }  # fmt: skip

    def tokens(self, made: Mapping[str, torch.Tensor]) -> int:
        """Return the patches divided by those of a group."""
        return int(made["image_grid_thw"][0].prod()) // self.vision.spatial_merge_size**2

    def tower(self, blocks: tuple[str, ...]) -> Tower:
        """Return that images differ in size; Qwen2.5-VL's tower is built like a decoder."""
        vision, later = self.vision, hasattr(self.vision, "window_size")
        return Tower(
            blocks, getattr(vision, "embed_dim", vision.hidden_size), vision.num_heads,
            vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
            merged=vision.spatial_merge_size**2, gated=later or vision.hidden_act == "quick_gelu", rotary=True,
            float32_norms=later,
        )  # fmt: skip

    def largest(self, processor: Mapping[str, Any]) -> int:
        """Return the tokens of as many pixels as the processor leaves: ``size.longest_edge``, or ``max_pixels``."""
        pixels = processor.get("max_pixels") or (processor.get("size") or {}).get("longest_edge") or _MOST_PIXELS
        return int(pixels) // (self.vision.patch_size * self.vision.spatial_merge_size) ** 2

    def shrink(self) -> None:
        """Keep two blocks of a small width, whose output is as wide as the small decoder."""
        vision, width = self.vision, self.config.get_text_config().hidden_size
        vision.depth, vision.num_heads = min(2, vision.depth), 4
        if hasattr(vision, "embed_dim"):  # Qwen2-VL: the blocks' width is this, and hidden_size is the decoder's
            vision.embed_dim, vision.hidden_size = 64, width
        else:  # Qwen2.5-VL: windows must hold a group of patches, and one block must see all
            vision.hidden_size, vision.out_hidden_size = 64, width
            vision.window_size = _SIDE * vision.spatial_merge_size * vision.patch_size
            vision.fullatt_block_indexes = [vision.depth - 1]

    def drawn(self, count: int, draw: torch.Generator) -> tuple[Row, list[int]]:
        """Return patches of images of several sizes."""
        vision, merge = self.vision, self.vision.spatial_merge_size
        grids = torch.tensor([[1, (2 + number) * merge, (3 - number % 2) * merge] for number in range(count)])
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        patches = torch.randn(int(grids.prod(1).sum()), width, generator=draw)
        return {"pixel_values": patches, "image_grid_thw": grids}, (grids.prod(1) // merge**2).tolist()


class Qwen3VL(Qwen2VL):
    """Qwen3-VL: as Qwen2-VL, with learned positions, and features that the first decoder layers read, too."""

    def tower(self, blocks: tuple[str, ...]) -> Tower:
        """Return that outputs of several blocks become features (DeepStack)."""
        return replace(super().tower(blocks), features=1 + len(self.vision.deepstack_visual_indexes))

    def shrink(self) -> None:
        """Keep two blocks, the first of which has features of its own."""
        vision = self.vision
        vision.depth, vision.num_heads, vision.hidden_size = min(2, vision.depth), 4, 64
        vision.out_hidden_size = self.config.get_text_config().hidden_size
        vision.num_position_embeddings, vision.deepstack_visual_indexes = _SIDE**2, [0]


FAMILIES: dict[str, type[Family]] = {"llava": Llava, "qwen2_vl": Qwen2VL, "qwen2_5_vl": Qwen2VL, "qwen3_vl": Qwen3VL}
"""``model_type`` in config.json -> its family: those whose losses and gradients are compared with upstream's."""


def family_of(config: PreTrainedConfig) -> Family:
    """Return the family of a model's config.

    Raises:
        ModelError: if it is not one of `FAMILIES`.
    """
    if config.model_type not in FAMILIES:
        raise ModelError(
            f"model.name: a {config.model_type} reads images, and of such models objective=sft trains "
            f"{', '.join(FAMILIES)} so far. Choose one of these, or a model of text alone."
        )
    return FAMILIES[config.model_type](config)
