"""`RowEncoder`: what is stored of a raw row, and how stored rows become batches. Each objective has one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from fsdp_qlora.data.columns import LENGTH, TARGETS
from fsdp_qlora.data.lines import Row
from fsdp_qlora.data.loader import Rows, StoredRows
from fsdp_qlora.data.samples import Segment
from fsdp_qlora.data.sources import fingerprint, not_read, read_source
from fsdp_qlora.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

Read = Callable[[Row], Mapping[str, Any]]
"""Returns the columns of a raw row, renamed and converted as the settings ask."""


@dataclass
class Counts:
    """What happened to the rows of one part (training or evaluation)."""

    rows: int = 0
    """Rows read, excluding bad ones."""
    kept: int = 0
    """Sequences kept for training or evaluation."""
    truncated: int = 0
    dropped_long: int = 0
    dropped_unsupervised: int = 0
    duplicates: int = 0
    """Rows with the same tokens as an earlier row; they are kept."""
    tokens: int = 0
    target_tokens: int = 0
    """Supervised tokens, or whatever else an objective learns: labels."""

    def add(self, other: Counts) -> None:
        """Add the counts of ``other``."""
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))


@dataclass
class Stored:
    """What is stored of one raw row: nothing, one item, or several."""

    key: int
    """Hash of what is asked; rows with the same key go to the same side of the evaluation split."""
    digest: bytes
    """Digest of the row's content, to count duplicates."""
    items: list[dict[str, Any]] = field(default_factory=list)
    """Column -> value, for each item."""
    counts: Counts = field(default_factory=lambda: Counts(rows=1))

    def keep(self, item: Mapping[str, Any], length: int, targets: int) -> None:
        """Store an item for `ColumnRows`, and count it: its columns, its tokens and what is learned of it."""
        self.items.append({**item, LENGTH: length, TARGETS: targets})
        self.counts.add(Counts(kept=1, tokens=length, target_tokens=targets))


Outcome = Stored | DataError


class RowEncoder(ABC):
    """Turns raw rows into stored items, and stored items into micro-batches."""

    columns: ClassVar[Mapping[str, str]]
    """Name -> type of each stored column: a pyarrow alias (``int32``), with ``[]`` for a list of any length."""
    identity: Any = None
    """Whatever changes the stored items, besides the settings of `data`, the tokenizer and the seed; JSON."""

    def raw_rows(self, name: str) -> Iterator[Row]:
        """Yield the raw rows of a source."""
        return read_source(name)

    def fingerprint(self, name: str) -> str:
        """Return a text that changes with the content of a source, and of the files that its rows name."""
        return fingerprint(name)

    def not_read(self, names: Iterable[str]) -> list[str]:
        """Return a line for each source with files that could be data, but are not read."""
        return not_read(names)

    @abstractmethod
    def encode(self, batch: list[tuple[int, Row]]) -> Iterator[tuple[int, str, Outcome]]:
        """Yield (source, place, what is stored or the error) for each raw row, in order."""

    @abstractmethod
    def rows(self, data: Dataset) -> StoredRows:
        """Return stored items as rows to make batches of."""

    def training_rows(self, data: Dataset, seed: int) -> StoredRows:
        """Return stored items as rows to train on, with whatever is drawn anew each time from the run's ``seed``."""
        return self.rows(data)

    @abstractmethod
    def segments(self, rows: Rows, number: int) -> list[Segment]:
        """Return row ``number`` as a reader should see it."""


class EachAlone(RowEncoder):
    """An encoder that needs nothing but the row itself."""

    def encode(self, batch: list[tuple[int, Row]]) -> Iterator[tuple[int, str, Outcome]]:
        """Yield the source, the place and what is stored of each row."""
        for number, row in batch:
            try:
                yield number, row.where, self.stored(row)
            except DataError as error:
                yield number, row.where, error

    @abstractmethod
    def stored(self, row: Row) -> Stored:
        """Return what is stored of a row.

        Raises:
            DataError: saying what is wrong with it; the caller names the row.
        """
