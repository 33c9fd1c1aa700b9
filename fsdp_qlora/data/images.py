"""Images: checked when rows are prepared, read when a batch is built. Needs Pillow (the extra ``images``)."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fsdp_qlora.data.named_files import content_digest, content_of, each_checked
from fsdp_qlora.errors import DataError, first_line

if TYPE_CHECKING:
    from PIL.Image import Image

_DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
"""Pillow's modes of more than 8 bits, which it would cut off rather than scale."""


T = TypeVar("T")


@dataclass(frozen=True)
class Measured:
    """An image that was read whole."""

    digest: bytes
    """Of the file's content, 16 bytes."""
    size: tuple[int, int]
    """Width and height in pixels, as `read_image` returns it."""


def check_images(files: Sequence[Path]) -> list[bytes | DataError]:
    """Check on all cores that files are images which can be read; return a digest of each, or what is wrong with it.

    A PNG's checksums are verified; of a JPEG an eighth of the resolution is decoded, of others everything.
    """
    return _of_each(files, _check)


def measure_images(files: Sequence[Path]) -> list[Measured | DataError]:
    """Read images whole on all cores; return the digest and size of each, or what is wrong with it."""
    return _of_each(files, lambda file, content: Measured(content_digest(content), _upright(file, content).size))


def _of_each(files: Sequence[Path], work: Callable[[Path, bytes], T]) -> list[T | DataError]:
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # it is an error here
        return each_checked(files, "image", work)


def _check(file: Path, content: bytes) -> bytes:
    with _opened(file, content) as image:
        if image.format == "PNG":
            image.verify()
        else:
            image.draft(image.mode, (max(1, image.width // 8), max(1, image.height // 8)))  # JPEG alone has drafts
            image.load()
    return content_digest(content)


def read_image(file: Path) -> Image:
    """Return the image in a file in RGB, turned as its EXIF data say; transparency is left out.

    Raises:
        DataError: if it cannot be read.
    """
    return _upright(file, content_of(file, "image"))


def _upright(file: Path, content: bytes) -> Image:
    from PIL import ImageOps

    with _opened(file, content) as image:
        turned = ImageOps.exif_transpose(image)
        if turned.mode == "P" and "transparency" in turned.info:
            turned = turned.convert("RGBA")  # as Pillow asks for
        return turned.convert("RGB")


@contextmanager
def _opened(file: Path, content: bytes) -> Iterator[Image]:
    """Open an image of which so far only the header is read; whatever goes wrong is a DataError that names the file."""
    from PIL import Image, UnidentifiedImageError

    most = Image.MAX_IMAGE_PIXELS
    try:
        with Image.open(io.BytesIO(content)) as image:
            if most is not None and image.width * image.height > most:
                raise Image.DecompressionBombError
            if image.mode in _DEEP:
                raise DataError(
                    f"the image {file} has more than 8 bits a channel (Pillow's mode {image.mode}); convert it to 8"
                )
            yield image
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"{file} is not an image of a known kind") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"the image {file} has more than {most} pixels, as a decompression bomb would have") from error
    except Exception as error:  # each format has its own
        raise DataError(f"the image {file} cannot be read: {first_line(error)}") from error
