"""What exports of whole models share: a new folder that appears at once, and the files beside a model's weights."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from fsdp_qlora.errors import ModelError, StorageError
from fsdp_qlora.files.read import own_file, walk
from fsdp_qlora.files.scratch import fresh_folder
from fsdp_qlora.files.write import sync, write_text
from fsdp_qlora.model.tokenizer import CHAT_TEMPLATE, TOKENIZER_CONFIG, stored_template, template_beside


@dataclass(frozen=True)
class Kind:
    """A kind of folder that an export writes, and replaces with ``export.overwrite=true``."""

    name: str
    mark: str
    """The file that tells it from other folders."""


MERGE = Kind("merge", "merged.json")
SERVED = Kind("base with an adapter", "served.json")
BASE = Kind("base in 4 bits", "base_4bit.json")
ADAPTER = Kind("adapter", "adapter_config.json")
GGUF = Kind("GGUF export", "gguf.json")
MARKS = (MERGE.mark, SERVED.mark, BASE.mark, GGUF.mark)
"""Files of ours that no other library reads; they say which linears were folded, adapted or quantized."""
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
            for entry in (*walk(staging), staging):
                sync(Path(entry))
            put(staging, target.absolute())
        sync(target.absolute().parent)
    except (OSError, SafetensorError) as error:  # the latter is how safetensors reports a full disk
        if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise ModelError(
                f"export.to: {target} was written by another process in the meantime; it is left unchanged."
            ) from error
        raise StorageError(f"export.to: {target} cannot be written: {error}.") from error


def require_free(target: Path, kind: Kind, overwrite: bool, kept: Iterable[Path] = ()) -> None:
    """Check that a folder may be written, or replaced with ``overwrite``: an earlier export of this kind, nothing else.

    Raises:
        ModelError: if it is not empty and no such export, a link, no folder, below a file, or one of the folders
            ``kept``, or around one of them.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        what = "a link" if target.is_symlink() else "a file"
        raise ModelError(f"export.to: {target} is {what}; name a new folder.")
    above = next(path for path in target.absolute().parents if path.exists())
    if not above.is_dir():
        raise ModelError(f"export.to: {target} is below {above}, which is a file; name a new folder.")
    own = target.resolve()
    for folder in (path.resolve() for path in kept):
        if own == folder or own in folder.parents:
            raise ModelError(f"export.to: {target} is, or holds, {folder}, which is read here; choose another folder.")
    if not target.exists() or not any(target.iterdir()):
        return
    if not (target / kind.mark).is_file():
        raise ModelError(f"export.to: {target} is not empty and no earlier {kind.name}; choose another folder.")
    if not overwrite:
        raise ModelError(
            f"export.to: {target} already holds a {kind.name}; choose another folder, or set export.overwrite=true."
        )


def put(staging: Path, target: Path, overwrite: bool) -> None:
    """Move the finished folder to its place; an earlier one is put aside first, and removed after."""
    if not overwrite or not target.exists():
        staging.rename(target)
    else:
        with fresh_folder(target) as aside:
            before = aside / "before"
            target.rename(before)
            try:
                staging.rename(target)
            except OSError:
                before.rename(target)
                raise
    sync(target.parent)


def beside_the_weights(source: Path) -> dict[str, Path]:
    """Return the files next to the weights (tokenizer, generation config) by name, with their resolved paths.

    An adapter's config is left out: beside a model, transformers would load that adapter onto it.
    """
    names = {file.name for pattern in _COPIED for file in source.glob(pattern)}
    names = {name for name in names if name not in (*MARKS, ADAPTER.mark) and not name.endswith(".index.json")}
    real = {name: own_file(source, name) for name in sorted(names)}
    return {name: file for name, file in real.items() if file.is_file()}


def of_tokenizer(adapter: Path) -> dict[str, Path]:
    """Return the tokenizer's files in an adapter's folder, by name; beside a model's weights, they replace its own."""
    return beside_the_weights(adapter)


def keep_template(folder: Path, adapter: Path) -> None:
    """Let a model's folder, with an adapter's tokenizer in it, have that adapter's chat template.

    transformers reads the template in a file of its own first, which may be the base's; other tools keep an adapter's
    in its tokenizer's config.

    Raises:
        ModelError: if the adapter's cannot be read.
        OSError: if the folder cannot be written.
    """
    file = template_beside(adapter)
    if file is not None and file.name == TOKENIZER_CONFIG:
        write_text(folder / CHAT_TEMPLATE, stored_template(file) or "")
