"""Where rows with images come from: folders of class folders, and the usual files of rows, which name image files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from fsdp_qlora.data.folders import is_data, is_inside
from fsdp_qlora.data.lines import Row
from fsdp_qlora.data.named_files import stamp_of_named
from fsdp_qlora.data.readers import kind_of
from fsdp_qlora.data.sources import fingerprint, folders_of_files, not_read, read_source
from fsdp_qlora.errors import DataError

IMAGE, LABEL = "image", "label"
"""Columns of a row: the path of an image, and its label."""
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
"""Ends of the names of files in class folders that are images."""

_SPLITS = frozenset({"train", "training", "test", "testing", "val", "valid", "validation", "eval", "dev"})
"""Names of folders that are no labels if there are no others."""


def is_class_folder(name: str) -> bool:
    """Whether a source is a folder of class folders: it has folders, and no file of rows beside them."""
    folder = Path(name).expanduser()
    if "://" in name or not folder.is_dir():
        return False
    inside = list(folder.iterdir())
    rows = (kind_of(x.name) not in (None, "text") and is_data(x, folder) and x.is_file() for x in inside)
    return any(x.is_dir() and is_data(x, folder) for x in inside) and not any(rows)


def image_rows(name: str) -> Iterator[Row]:
    """Yield the rows of a source, each with the folder that its image's path starts from.

    Raises:
        DataError: if the source is missing, empty or unreadable, or a class folder holds no image.
    """
    if not is_class_folder(name):
        yield from read_source(name)
        return
    folder = Path(name).expanduser()
    for label, files in _classes(folder).items():
        for file in files:
            yield Row(str(file), {IMAGE: str(file.relative_to(folder)), LABEL: label}, folder=str(folder))


def folders_of(name: str) -> list[str]:
    """Return the folders that images' paths in a source start from, as its rows have them."""
    if is_class_folder(name):
        return [str(Path(name).expanduser())]
    return folders_of_files(name)


def images_fingerprint(name: str, named: Callable[[Row], Sequence[str]]) -> str:
    """Return a text that changes with a source's rows and with the images that they name (`named_files.stamp_of`).

    Args:
        name: the source.
        named: returns the paths of a row's images, from the row's folder.

    Raises:
        DataError: as `image_rows`.
    """
    rows = "" if is_class_folder(name) else fingerprint(name)
    return f"images {stamp_of_named(image_rows(name), named)}\n{rows}"


def images_not_read(names: Iterable[str]) -> list[str]:
    """Return a line for each folder with files that could be data but that none of ``names`` reads."""
    lines, others = [], []
    for name in names:
        if not is_class_folder(name):
            others.append(name)
            continue
        folder = Path(name).expanduser()
        read = {file for files in _classes(folder).values() for file in files}
        left = [x for x in sorted(folder.rglob("*")) if x.is_file() and x not in read and is_data(x, folder)]
        if left:
            some = ", ".join(str(file.relative_to(folder)) for file in left[:3])
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            lines.append(f"data: {folder}: skipped {some}{more} (no images by their names, or links to files outside)")
    return [*lines, *not_read(others)]


def _classes(folder: Path) -> dict[str, list[Path]]:
    """Return each class folder's images, also those in folders inside it, both sorted by name."""
    classes: dict[str, list[Path]] = {}
    folders = sorted(x for x in folder.iterdir() if x.is_dir() and is_data(x, folder))
    names = {x.name.lower() for x in folders}
    if len(names) > 1 and names <= _SPLITS:
        raise DataError(
            f"data: {folder} holds {', '.join(sorted(names))}, which are parts of a data set and not labels. Set "
            f"data.train={folder}/train and data.eval to another."
        )
    for inside in folders:
        files = sorted(x for x in inside.rglob("*") if x.suffix.lower() in SUFFIXES and is_data(x, folder))
        own = [file for file in files if file.is_file() and is_inside(file, folder)]
        if not own:
            links = f"; links to files outside it, such as {files[0].name}, are not followed" if files else ""
            raise DataError(
                f"data: the class folder {inside} holds no image{links}. Remove it, or name the folder whose folders "
                "are the classes."
            )
        classes[inside.name] = own
    return classes
