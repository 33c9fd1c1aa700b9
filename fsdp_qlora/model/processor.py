"""A model folder's image processor: what resizes, crops and normalizes images for it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fsdp_qlora.errors import ConfigError, ModelError, typed_line
from fsdp_qlora.files.read import own_file, read_json
from fsdp_qlora.files.write import copy_regular
from fsdp_qlora.model.config import not_buildable, require_sane

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedTokenizerBase

FILE = "preprocessor_config.json"


_TEMPLATE = "chat_template.json"
_BESIDE = (FILE, "processor_config.json", "video_preprocessor_config.json")
"""Files of a processor, besides those of its tokenizer."""


@dataclass(frozen=True)
class ImageTextProcessor:
    """What reads texts with images: a tokenizer and an image processor.

    Upstream's own class around both would also load a video processor, which needs torchvision.
    """

    tokenizer: PreTrainedTokenizerBase
    image_processor: BaseImageProcessor
    folder: Path
    """The model's folder."""

    def save_pretrained(self, folder: str) -> None:
        """Write the tokenizer's files into ``folder``, and the processor's as they came with the model."""
        self.tokenizer.save_pretrained(folder)
        for name in _BESIDE:
            if (self.folder / name).is_file():
                copy_regular(own_file(self.folder, name), Path(folder, name))


def build_image_text_processor(
    folder: Path, tokenizer: PreTrainedTokenizerBase, own_template: bool = True, trust_remote_code: bool = False
) -> ImageTextProcessor:
    """Return what reads texts with images for the model in ``folder``.

    Args:
        folder: the model's folder.
        tokenizer: its tokenizer.
        own_template: whether the chat template is the model's. Older folders keep the processor's in a file of its own.
        trust_remote_code: whether code may come with the model.

    Raises:
        ConfigError, ModelError, SecurityError: as `build_image_processor`.
    """
    if own_template and (folder / _TEMPLATE).is_file():
        try:
            tokenizer.chat_template = read_json(own_file(folder, _TEMPLATE), dict[str, str])["chat_template"]
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"model.name: {folder / _TEMPLATE} holds no chat template: {typed_line(error)}") from error
    return ImageTextProcessor(tokenizer, build_image_processor(folder, 0, trust_remote_code), folder)


def build_image_processor(folder: Path, size: int = 0, trust_remote_code: bool = False) -> BaseImageProcessor:
    """Load the image processor of ``folder``, in the form that computes with Pillow and numpy.

    Args:
        folder: the model's folder.
        size: height and width of the images that it makes, in pixels; 0 = its own.
        trust_remote_code: whether its code may come with the model.

    Raises:
        ConfigError: if Pillow is not installed.
        ModelError: if there is no processor that transformers can load, or it has no size that can be set.
        SecurityError: if its file is a link that leads outside the folder.
    """
    if find_spec("PIL") is None:
        raise ConfigError(
            "objective: images need Pillow, which is not installed; run `pip install 'fsdp-qlora[images]'`."
        )
    from transformers import AutoImageProcessor

    own_file(folder, FILE)
    require_sane(folder)
    try:
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=trust_remote_code)
    except Exception as error:  # a damaged file can raise anything
        if "trust_remote_code" in str(error):
            raise not_buildable(folder, error) from error
        raise ModelError(f"model.name: {folder} has no usable image processor ({FILE}): {typed_line(error)}") from error
    if size:
        _resize(processor, size)
    return processor


def _resize(processor: Any, size: int) -> None:
    """Let a processor make images of ``size`` x ``size``; what it crops away keeps its share."""
    before, crop = dict(processor.size or {}), dict(getattr(processor, "crop_size", None) or {})
    crops = bool(getattr(processor, "do_center_crop", False)) and {"height", "width"} <= crop.keys()
    if crops:
        processor.crop_size = type(processor.crop_size)(height=size, width=size)
    factor = size / int(crop["height"]) if crops else 1
    if {"height", "width"} <= before.keys():
        sides = {key: round(before[key] * factor) if crops else size for key in ("height", "width")}
        processor.size = type(processor.size)(**sides)
    elif "shortest_edge" in before and "longest_edge" not in before and crops:
        processor.size = type(processor.size)(shortest_edge=round(before["shortest_edge"] * factor))
    else:
        raise ModelError(
            f"objective.image_size: the size of {type(processor).__name__} ({before}) cannot be set to {size}; leave "
            "it out."
        )
