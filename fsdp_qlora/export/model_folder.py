"""What exports of whole models share: a new folder that appears at once, and the files beside a model's weights."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from fsdp_qlora.errors import ModelError, StorageError
from fsdp_qlora.files.read import own_file
from fsdp_qlora.files.scratch import fresh_folder
from fsdp_qlora.files.write import sync

_COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.py", "LICENSE*")


@contextmanager
def new_folder(target: Path, put: Callable[[Path, Path], object] = Path.rename) -> Iterator[Path]:
    """Yield a staging folder; once it is filled, sync it and ``put`` it to the absolute path of ``target``.

    Raises:
        ModelError: if another process has written ``target`` meanwhile.
        StorageError: if it cannot be written.
    """
    try:
        with fresh_folder(target) as staging:
            yield staging
            for file in (*staging.iterdir(), staging):
                sync(file)
            put(staging, target.absolute())
        sync(target.absolute().parent)
    except (OSError, SafetensorError) as error:  # the latter is how safetensors reports a full disk
        if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise ModelError(
                f"export.to: {target} was written by another process in the meantime; it is left unchanged."
            ) from error
        raise StorageError(f"export.to: {target} cannot be written: {error}.") from error


def beside_the_weights(source: Path) -> dict[str, Path]:
    """Return the files next to the weights (tokenizer, generation config) by name, with their resolved paths."""
    names = {file.name for pattern in _COPIED for file in source.glob(pattern)}
    real = {name: own_file(source, name) for name in sorted(names) if not name.endswith(".index.json")}
    return {name: file for name, file in real.items() if file.is_file()}
