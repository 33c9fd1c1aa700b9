"""Conversations with images: stored as tokens with the images' paths, read as pixels when a batch is built.

The template writes one token for each image. A model reads a token for each of its patches instead, so that token is
repeated, as often as the image's size asks for; none of the repeats is learned. What is stored is what the model reads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from fsdp_qlora.data.chat import Example
from fsdp_qlora.data.columns import LENGTH, TARGETS, ColumnRows, mask_of, padded
from fsdp_qlora.data.encode import Encoded
from fsdp_qlora.data.encoder import Outcome, Read, RowEncoder, Stored
from fsdp_qlora.data.file_rows import FOLDER, Folders
from fsdp_qlora.data.image_messages import PartsTemplate, marked
from fsdp_qlora.data.image_rows import folders_of, images_fingerprint
from fsdp_qlora.data.images import Measured, measure_images, read_image
from fsdp_qlora.data.labels import IGNORE, learned_positions
from fsdp_qlora.data.lines import Row
from fsdp_qlora.data.loader import Rows
from fsdp_qlora.data.pairs import LABELS, SUPERVISED
from fsdp_qlora.data.samples import Segment, runs_of
from fsdp_qlora.data.tokens import Fit, encoded_rows, fit_row
from fsdp_qlora.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerBase

_IMAGES = "images"
IMAGE_TOKENS = "image_tokens"
"""Column of stored rows: tokens of images in them."""
Measure = Callable[[tuple[int, int]], int]
"""(width, height) of an image -> tokens that a model reads for it; raises DataError if it reads none of that size."""
Pixels = Callable[[Sequence["Image"]], Mapping[str, torch.Tensor]]
"""Images -> the model's inputs for them, by name."""


@dataclass(frozen=True)
class Reads:
    """How a model reads images among tokens."""

    token: int
    """Id of the token that stands for a part of an image."""
    measure: Measure
    pixels: Pixels
    num_ids: int
    """Token ids that the model knows."""
    pad: int
    marks: str = ""
    """Name of the input that says of each token whether it is text (0) or of an image (1); empty if there is none."""


class ImageChats(RowEncoder):
    """Stores a conversation's tokens, which of them are learned, and the paths of its images."""

    columns: ClassVar = {
        "input_ids": "int32[]", "learned": "bool[]", _IMAGES: "string[]", FOLDER: "int32", LENGTH: "int32",
        TARGETS: "int32", IMAGE_TOKENS: "int32",
    }  # fmt: skip

    def __init__(
        self, read: Read, example: Callable[[Mapping[str, Any]], Example], tokenizer: PreTrainedTokenizerBase,
        fit: Fit, reads: Reads, sources: Sequence[str], identity: Any,
    ) -> None:  # fmt: skip
        """Store conversations.

        Args:
            read: reads a row's columns.
            example: reads a conversation from columns with marks instead of images.
            tokenizer: the model's, with its chat template.
            fit: what becomes of long rows; an image is never cut.
            reads: how the model reads images.
            sources: names of all sources, whose folders the images' paths start from.
            identity: whatever changes ``reads``, as JSON.
        """
        self._read, self._example, self._tokenizer, self._fit, self._reads = read, example, tokenizer, fit, reads
        self._folders = Folders(folder for name in sources for folder in folders_of(name))
        self.identity = ["image chats, their tokens counted", identity, self._folders.shared]
        self._tokens: dict[tuple[int, int], int | DataError] = {}

    def fingerprint(self, name: str) -> str:
        """Return a text that changes with the rows of a source and with their images."""
        return images_fingerprint(name, lambda row: marked(self._read(row))[1])

    def encode(self, batch: list[tuple[int, Row]]) -> Iterator[tuple[int, str, Outcome]]:
        """Yield the source, the place and what is stored of each row; images are read all at once."""
        named: list[list[str]] = []

        def read(row: Row) -> Example:
            named.append([])
            values, named[-1] = marked(self._read(row))
            return self._example(values)

        encoded = list(encoded_rows(batch, read, self._tokenizer, self._fit.train_on, PartsTemplate))
        files = [
            Path(row.folder, path).expanduser() for (_, row), paths in zip(batch, named, strict=True) for path in paths
        ]
        images = iter(measure_images(files))
        for (_, row), paths, (number, where, key, outcome) in zip(batch, named, encoded, strict=True):
            own = [next(images) for _ in paths]
            try:
                yield number, where, self._stored(row, paths, own, key, outcome)
            except DataError as error:
                yield number, where, error

    def _stored(
        self, row: Row, paths: list[str], images: list[Measured | DataError], key: int, encoded: Encoded | DataError
    ) -> Stored:
        if problem := next((x for x in (encoded, *images) if isinstance(x, DataError)), None):
            raise problem
        whole = [image for image in images if isinstance(image, Measured)]
        assert not isinstance(encoded, DataError)
        ids, learned = self._expanded(encoded, [self._length(image.size) for image in whole])
        digests = b"".join(image.digest for image in whole)
        if digests:  # a question about another image is another question
            asked = hashlib.blake2b(key.to_bytes(8, "little") + digests, digest_size=8).digest()
            key = int.from_bytes(asked, "little")
        stored = Stored(key, hashlib.blake2b(ids.tobytes() + digests, digest_size=16).digest())
        if self._cuts_an_image(ids):
            stored.counts.dropped_long += 1
            return stored
        place = {_IMAGES: paths, FOLDER: self._folders.number(row) if paths else 0}
        for tokens, flags in fit_row((ids, learned), self._fit, stored.counts):
            own = {LENGTH: len(tokens), TARGETS: int(flags[1:].sum())}
            own[IMAGE_TOKENS] = int((tokens == self._reads.token).sum())
            stored.items.append({"input_ids": tokens, "learned": flags, **place, **own})
        return stored

    def _length(self, size: tuple[int, int]) -> int:
        """Return the tokens of an image, which depend on nothing but its size."""
        if size not in self._tokens:
            try:
                self._tokens[size] = self._reads.measure(size)
            except DataError as error:
                self._tokens[size] = error
        tokens = self._tokens[size]
        if isinstance(tokens, DataError):
            raise tokens
        return tokens

    def _expanded(self, encoded: Encoded, lengths: list[int]) -> Encoded:
        """Return tokens with that of each image repeated, and which are learned: none of an image.

        Raises:
            DataError: if there are more or fewer such tokens than images, or a token that the model does not know.
        """
        ids, learned = encoded
        places = np.flatnonzero(ids == self._reads.token)
        if len(places) != len(lengths):
            word = self._tokenizer.convert_ids_to_tokens(self._reads.token)
            raise DataError(
                f"the conversation has {len(lengths)} images, but {len(places)} tokens {word} as the chat template "
                "writes it; its texts must not hold that token, and the template must write one for each image"
            )
        if len(ids) and int(ids.max()) >= self._reads.num_ids:
            raise DataError(
                f"the token {int(ids.max())} is beyond the model's {self._reads.num_ids}; use the tokenizer that came "
                "with the model"
            )
        counts = np.ones(len(ids), dtype=np.int64)
        counts[places] = lengths
        learned = learned.copy()
        learned[places] = False
        return np.repeat(ids, counts), np.repeat(learned, counts)

    def _cuts_an_image(self, ids: np.ndarray) -> bool:
        """Whether a row that is too long would lose tokens of an image: it would be half of one, or none."""
        limit = self._fit.max_length
        lost = ids[:-limit] if self._fit.truncation == "left" else ids[limit:]
        return len(ids) > limit and bool((lost == self._reads.token).any())

    def rows(self, data: Dataset) -> ColumnRows:
        """Return stored conversations as rows."""
        return ColumnRows(data, self._collate)

    def _collate(self, rows: Sequence[Mapping[str, Any]], numbers: tuple[int, ...], at: int) -> dict[str, torch.Tensor]:
        ids = [np.asarray(row["input_ids"]) for row in rows]
        nexts = [_nexts(one, np.asarray(row["learned"], dtype=bool)) for one, row in zip(ids, rows, strict=True)]
        labels = padded(nexts, IGNORE)
        tensors = {
            "input_ids": padded(ids, self._reads.pad), "attention_mask": mask_of(ids), LABELS: labels,
            SUPERVISED: learned_positions(labels),
        }  # fmt: skip
        files = [self._folders.file(int(row[FOLDER]), str(path)) for row in rows for path in row[_IMAGES]]
        if not files:
            return tensors
        if self._reads.marks:
            tensors[self._reads.marks] = padded([(one == self._reads.token).astype(np.int64) for one in ids], 0)
        return tensors | dict(self._reads.pixels([read_image(file) for file in files]))

    def segments(self, rows: Rows, number: int) -> list[Segment]:
        """Return row ``number`` with its learned parts; an image is one token."""
        assert isinstance(rows, ColumnRows)
        row = rows.row(number)
        ids, learned = np.asarray(row["input_ids"]), np.asarray(row["learned"], dtype=bool)
        again = (ids[1:] == self._reads.token) & (ids[:-1] == self._reads.token)
        kept = np.concatenate([[True], ~again])
        return runs_of(ids[kept].tolist(), learned[kept].tolist(), self._tokenizer)


def _nexts(ids: np.ndarray, learned: np.ndarray) -> np.ndarray:
    """Return for each token the next one if that is learned, else -100: what a causal model says at its place."""
    nexts = np.full(len(ids), IGNORE, dtype=np.int64)
    nexts[:-1] = np.where(learned[1:], ids[1:], IGNORE)
    return nexts
