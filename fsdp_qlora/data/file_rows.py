"""`FileEncoder`: rows that name a file each, which is checked when rows are prepared and read when a batch is built."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from fsdp_qlora.config.schema import DataSettings
from fsdp_qlora.data.encoder import Outcome, Read, RowEncoder, Stored
from fsdp_qlora.data.lines import Row
from fsdp_qlora.data.prepare import columns_of
from fsdp_qlora.data.sources import names_of
from fsdp_qlora.errors import DataError

FOLDER = "folder"
"""The stored column with the number of the folder that a file's path starts from."""
_Rest = TypeVar("_Rest")
_Checked = TypeVar("_Checked")


class Folders:
    """The folders that paths in rows start from.

    Stored rows name one by its number, so that a copy of the data elsewhere is the same data.
    """

    def __init__(self, folders: Iterable[str]) -> None:
        self._folders = list(folders)
        self.shared = [self._folders.index(folder) for folder in self._folders]
        """Which of them are the same."""

    def number(self, row: Row) -> int:
        """Return the number of a row's folder."""
        return self._folders.index(row.folder)

    def file(self, number: int, name: str) -> Path:
        """Return the path of a file from the number of its folder."""
        return Path(self._folders[number], name).expanduser()


class Named(NamedTuple):
    """A file as its row names it."""

    folder: int
    """The number of the folder that the path starts from."""
    name: str


class FileEncoder(RowEncoder, Generic[_Rest, _Checked]):
    """Stores the path of a file, and what else its row has (``_Rest``)."""

    column: ClassVar[str]
    """The column with the path."""
    what: ClassVar[str]
    """What messages call the file: ``image``."""

    def __init__(self, data: DataSettings) -> None:
        self._read: Read = columns_of(data)
        names = [*names_of(data.train or []), *names_of(data.eval or [])]
        self.folders = Folders(folder for name in names for folder in self.folders_of(name))

    @abstractmethod
    def folders_of(self, name: str) -> list[str]:
        """Return the folders that paths in a source start from, as its rows have them."""

    @abstractmethod
    def check(self, files: Sequence[Path]) -> Sequence[_Checked | DataError]:
        """Check files, all at once; return what is to be stored of each, or what is wrong with it."""

    @abstractmethod
    def rest(self, values: Mapping[str, Any]) -> _Rest:
        """Return what else is stored of a row with these columns.

        Raises:
            DataError: if it is missing or wrong.
        """

    @abstractmethod
    def stored(self, named: Named, rest: _Rest, checked: _Checked) -> Stored:
        """Return what is stored of a row.

        Raises:
            DataError: if the model cannot take it.
        """

    def encode(self, batch: list[tuple[int, Row]]) -> Iterator[tuple[int, str, Outcome]]:
        """Yield the source, the place and what is stored of each row; files are checked all at once."""
        parsed = [self._parsed(row) for _, row in batch]
        files = [self.folders.file(*one[0]) for one in parsed if not isinstance(one, DataError)]
        results = iter(self.check(files))
        for (number, row), one in zip(batch, parsed, strict=True):
            yield number, row.where, one if isinstance(one, DataError) else self._outcome(*one, next(results))

    def _outcome(self, named: Named, rest: _Rest, checked: _Checked | DataError) -> Outcome:
        if isinstance(checked, DataError):
            return checked
        try:
            return self.stored(named, rest, checked)
        except DataError as error:
            return error

    def _parsed(self, row: Row) -> tuple[Named, _Rest] | DataError:
        """Return the file and the rest of a row, or what is wrong with it."""
        try:
            values = self._read(row)
            name = values.get(self.column)
            if name is None:
                raise DataError(f"the row has no {self.column!r} (data.columns can rename another column to it)")
            if not isinstance(name, str) or not name.strip() or "\0" in name:
                raise DataError(f"expected the path of an {self.what} file, got {str(name)[:80]!r}")
            name.encode()
            return Named(self.folders.number(row), name), self.rest(values)
        except UnicodeEncodeError:
            return DataError(f"the name of the {self.what} file is not valid UTF-8; rename it")
        except DataError as error:
            return error
