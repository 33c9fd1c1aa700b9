"""image_classification: a label, several labels, or a number for each image."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import nn

from fsdp_qlora.config.schema import DataSettings
from fsdp_qlora.data.columns import LENGTH, TARGETS, ColumnRows
from fsdp_qlora.data.encoder import RowEncoder, Stored
from fsdp_qlora.data.file_rows import FOLDER, FileEncoder, Named
from fsdp_qlora.data.image_rows import IMAGE, folders_of, image_rows, images_fingerprint, images_not_read
from fsdp_qlora.data.images import check_images, read_image
from fsdp_qlora.data.lines import Row
from fsdp_qlora.data.loader import Rows
from fsdp_qlora.data.samples import Segment
from fsdp_qlora.data.texts import digest_of
from fsdp_qlora.errors import DataError, ModelError, first_line
from fsdp_qlora.files.read import own_file, read_json
from fsdp_qlora.objectives.augment import augmented
from fsdp_qlora.objectives.classifier import LABEL, Classifier, label_rows, stand_in_labels
from fsdp_qlora.objectives.labels import Labels
from fsdp_qlora.objectives.objective import PROBED, register

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel

    from fsdp_qlora.config.objective import Augmentation

_PIXELS, _RESIZES = "pixel_values", "interpolate_pos_encoding"
PREPROCESSOR = "preprocessor_config.json"
_PROBED_SIZE = 64
"""Height and width of images for the check, in pixels, where a model's config names none."""


@register
class ImageClassification(Classifier):
    """The loss that transformers' own ``For...ImageClassification`` computes, as a mean over rows."""

    name = "image_classification"
    auto_class = "AutoModelForImageClassification"
    task_type = None
    reads = "images"

    def raw_rows(self, name: str) -> Iterator[Row]:
        """Yield the raw rows of a source, which may be a folder of class folders."""
        return image_rows(name)

    def encoder(
        self, data: DataSettings, tokenizer: BaseImageProcessor, config: PreTrainedConfig
    ) -> ClassifiedImages:  # fmt: skip
        """Return what stores the paths of images with their labels, and reads the images for a batch."""
        return ClassifiedImages(data, tokenizer, config, self.labels, self.settings.augmentation)

    def row_length(self, folder: Path, config: PreTrainedConfig) -> int:
        """Return the patches of an image."""
        return _patches(config, _planned_size(folder, config, self.settings.image_size))

    def stand_in(self, folder: Path, config: PreTrainedConfig, rows: int, length: int) -> dict[str, torch.Tensor]:
        """Return images of the processor's size with a label each."""
        sides = _planned_size(folder, config, self.settings.image_size)
        pixels = torch.zeros(rows, getattr(config, "num_channels", 3), *sides)
        return {_PIXELS: pixels, LABEL: stand_in_labels(self.labels, rows)}

    def probe(self, config: PreTrainedConfig, draw: torch.Generator) -> list[dict[str, torch.Tensor]]:
        """Return images of the size that a small model of this config is built for, each alone, for the check."""
        size = getattr(config, "image_size", None) or _PROBED_SIZE
        sides = size if isinstance(size, list | tuple) else (size, size)
        shape = (1, getattr(config, "num_channels", 3), *sides)
        return [{_PIXELS: torch.randn(shape, generator=draw)} for _ in PROBED]

    def require_fit(self, encoder: RowEncoder, model: PreTrainedModel) -> None:
        """Check with upstream's own forward, without weights, that the model takes images of the processor's size.

        Raises:
            ModelError: if it does not.
        """
        assert isinstance(encoder, ClassifiedImages)
        if any(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) for module in model.modules()):
            raise ModelError(
                f"model.name: {type(model).__name__} has batch norms, whose running statistics change in training and "
                "would be in no adapter, so it cannot be trained here. Choose a model like ViT, DINOv2 or Swin."
            )
        height, width = encoder.size
        pixels = torch.empty(1, encoder.channels, height, width, device="meta", dtype=model.dtype)
        whole: nn.Module = deepcopy(model)
        whole.to_empty(device="meta")  # its buffers, too
        try:
            with torch.no_grad():
                whole(pixel_values=pixels, **self.options(model))
        except Exception as error:  # each family has a check of its own, or an operator fails
            raise ModelError(
                f"model.name: {type(model).__name__} cannot take the {height} x {width} images of its image processor: "
                f"{first_line(error)} Set objective.image_size: to the size that the model was trained with, or to "
                "another one, for which upstream's code then interpolates its table of positions."
            ) from error

    def options(self, model: nn.Module) -> dict[str, Any]:
        """Ask upstream's forward to interpolate the table of positions, if a size was asked for and it can."""
        base = getattr(model, "base", model)
        asked = self.settings.image_size and _RESIZES in signature(base.forward).parameters
        return {_RESIZES: True} if asked else {}


class ClassifiedImages(FileEncoder[list[float], bytes]):
    """Stores the path of an image and its label; a micro-batch has its pixels."""

    columns: ClassVar = {IMAGE: "string", FOLDER: "int32", LABEL: "float[]", LENGTH: "int32", TARGETS: "int32"}
    column, what = IMAGE, "image"

    def __init__(
        self, data: DataSettings, processor: BaseImageProcessor, config: PreTrainedConfig, labels: Labels,
        augmentation: Augmentation,
    ) -> None:  # fmt: skip
        super().__init__(data)
        self._processor, self._labels = processor, labels
        self._augmentation: Augmentation = augmentation
        self.size, self.channels = _made(processor)
        self._tokens = _patches(config, self.size)
        self.identity = ["image_classification", labels.names, labels.problem, processor.to_dict(), self.folders.shared]

    def raw_rows(self, name: str) -> Iterator[Row]:
        """Yield the raw rows of a source, which may be a folder of class folders."""
        return image_rows(name)

    def fingerprint(self, name: str) -> str:
        """Return a text that changes with the rows of a source and with their images."""
        return images_fingerprint(name, lambda row: [str(self._read(row).get(IMAGE))])

    def not_read(self, names: Iterable[str]) -> list[str]:
        """Return a line for each source with files that could be data, but are not read."""
        return images_not_read(names)

    def folders_of(self, name: str) -> list[str]:
        """Return the folders that images' paths in a source start from."""
        return folders_of(name)

    def check(self, files: Sequence[Path]) -> list[bytes | DataError]:
        """Return a digest of each image, or what is wrong with it."""
        return check_images(files)

    def rest(self, values: Mapping[str, Any]) -> list[float]:
        """Return a row's label."""
        return self._labels.vector(values.get(LABEL))

    def stored(self, named: Named, rest: list[float], checked: bytes) -> Stored:
        """Return what is stored of an image."""
        stored = Stored(int.from_bytes(checked[:8], "little"), digest_of(checked, repr(rest).encode()))
        stored.keep({IMAGE: named.name, FOLDER: named.folder, LABEL: rest}, self._tokens, 1)
        return stored

    def rows(self, data: Dataset) -> ColumnRows:
        """Return stored images as rows, which are not augmented."""
        return ColumnRows(data, lambda rows, numbers, at: self._collate("none", 0, rows, numbers, at))

    def training_rows(self, data: Dataset, seed: int) -> ColumnRows:
        """Return stored images as rows to train on, each augmented anew whenever it is read."""
        kind = self._augmentation
        return ColumnRows(data, lambda rows, numbers, at: self._collate(kind, seed, rows, numbers, at))

    def _collate(
        self,
        augmentation: Augmentation,
        seed: int,
        rows: Sequence[Mapping[str, Any]],
        numbers: tuple[int, ...],
        at: int,
    ) -> dict[str, torch.Tensor]:
        images = []
        for row, number in zip(rows, numbers, strict=True):
            image = read_image(self.folders.file(int(row[FOLDER]), str(row[IMAGE])))
            draw = np.random.Generator(np.random.PCG64([seed, at, number]))
            images.append(augmented(image, augmentation, draw))
        pixels = self._processor(images=images, return_tensors="pt")[_PIXELS]
        return {_PIXELS: pixels, LABEL: label_rows(rows)}

    def segments(self, rows: Rows, number: int) -> list[Segment]:
        """Return a row's path, and its label as what is learned."""
        assert isinstance(rows, ColumnRows)
        row = rows.row(number)
        return [Segment(f"{row[IMAGE]} ", False, self._tokens), Segment(self._labels.shown(row[LABEL]), True, 1)]


def _made(processor: BaseImageProcessor) -> tuple[tuple[int, int], int]:
    """Return height and width, and the channels, of what an image processor makes of any image.

    Raises:
        ModelError: if that is no image, or its size depends on the image.
    """
    from PIL import Image

    wide, high = Image.new("RGB", (80, 50)), Image.new("RGB", (50, 90))
    name = type(processor).__name__
    try:
        shapes = [processor(images=[image], return_tensors="pt")[_PIXELS].shape for image in (wide, high)]
    except Exception as error:  # odd settings can raise anything upstream
        raise ModelError(f"model.name: its image processor ({name}) fails: {first_line(error)}") from error
    if len(shapes[0]) != 4 or shapes[0] != shapes[1]:
        raise ModelError(
            f"model.name: its image processor ({name}) makes images of several sizes ({list(shapes[0])} and "
            f"{list(shapes[1])}), which do not fit into one batch; set do_center_crop or a fixed size in its "
            "preprocessor_config.json."
        )
    return (int(shapes[0][2]), int(shapes[0][3])), int(shapes[0][1])


def _planned_size(folder: Path, config: PreTrainedConfig, asked: int) -> tuple[int, int]:
    """Return height and width of the images that a model reads: as asked, by its processor's file, by its config."""
    file = own_file(folder, PREPROCESSOR)
    stored: dict[str, Any] = read_json(file, dict) if file.is_file() and not asked else {}
    crops = stored.get("do_center_crop", True) and stored.get("crop_size")
    for size in (asked, crops, stored.get("size"), getattr(config, "image_size", None)):
        if (sides := _sides(size)) is not None:
            return sides
    return _PROBED_SIZE, _PROBED_SIZE


def _sides(size: Any) -> tuple[int, int] | None:
    """Return height and width as upstream's files have them: a number, two, or by name; None if there are none."""
    if isinstance(size, dict):
        size = [size.get(key) or size.get("shortest_edge") for key in ("height", "width")]
    sides: list[Any] = list(size) if isinstance(size, list | tuple) else [size, size]
    return (sides[0], sides[1]) if len(sides) == 2 and all(isinstance(x, int) and x > 0 for x in sides) else None


def _patches(config: PreTrainedConfig, size: tuple[int, int]) -> int:
    """Return the patches of an image, which are its tokens; 1 if the model's config names no size of a patch."""
    patch = getattr(config, "patch_size", None)
    sides = patch if isinstance(patch, list | tuple) else (patch, patch)
    if not all(isinstance(side, int) and side > 0 for side in sides):
        return 1
    return max(1, size[0] // int(sides[0])) * max(1, size[1] // int(sides[-1]))  # type: ignore[arg-type]
