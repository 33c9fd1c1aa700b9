"""Recordings with what is said in them, as a speech model (Whisper) learns them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from fsdp_qlora.config.schema import DataSettings
from fsdp_qlora.data.audio import Recording, check_recordings, read_recording
from fsdp_qlora.data.columns import LENGTH, TARGETS, ColumnRows, padded
from fsdp_qlora.data.encoder import Stored
from fsdp_qlora.data.file_rows import FOLDER, FileEncoder, Named
from fsdp_qlora.data.labels import IGNORE, learned_positions
from fsdp_qlora.data.loader import Rows
from fsdp_qlora.data.named_files import stamp_of_named
from fsdp_qlora.data.pairs import LABELS, SUPERVISED, TARGET, Side
from fsdp_qlora.data.samples import Segment
from fsdp_qlora.data.sources import fingerprint, folders_of_files, read_source
from fsdp_qlora.data.texts import digest_of, text_in
from fsdp_qlora.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import WhisperProcessor

AUDIO, TEXT, FEATURES = "audio", "text", "input_features"
"""Columns of a row, the path of a recording and what is said in it; and the tensor that the encoder reads."""


class SpokenEncoder(FileEncoder[str, Recording]):
    """Stores the path of a recording and the tokens of its text; a micro-batch has its log-mel spectrogram."""

    columns: ClassVar = {
        AUDIO: "string", FOLDER: "int32", LABELS: "int32[]", TARGET: "string", LENGTH: "int32", TARGETS: "int32"
    }  # fmt: skip
    column, what = AUDIO, "audio"

    def __init__(
        self, data: DataSettings, processor: WhisperProcessor, targets: Side, num_positions: int, max_targets: int
    ) -> None:
        """Store recordings.

        Args:
            data: the settings of the rows.
            processor: the model's feature extractor, and its tokenizer with the prefix of its targets.
            targets: tokenizes texts, with the prefix; upstream puts its first token before labels, so they lack it.
            num_positions: what the encoder makes of every recording, in tokens.
            max_targets: the longest target that the decoder has positions for, in tokens.
        """
        super().__init__(data)
        self._extractor: Any = processor.feature_extractor  # type: ignore[attr-defined]
        self._tokenizer: Any = processor.tokenizer  # type: ignore[attr-defined]
        self._targets = targets
        self._num_positions, self._max_targets = num_positions, max_targets
        self.identity = [
            "speech", targets.identity, self._tokenizer.prefix_tokens, num_positions, max_targets,
            self._extractor.to_dict(), self.folders.shared,
        ]  # fmt: skip

    @property
    def longest(self) -> float:
        """The longest recording that the model hears, in seconds."""
        return self._extractor.n_samples / self._extractor.sampling_rate

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of a spectrogram."""
        return self._extractor.feature_size, self._extractor.nb_max_frames

    def fingerprint(self, name: str) -> str:
        """Return a text that changes with the rows of a source and with their recordings."""
        stamps = stamp_of_named(read_source(name), lambda row: [str(self._read(row).get(AUDIO))])
        return f"audio {stamps}\n{fingerprint(name)}"

    def folders_of(self, name: str) -> list[str]:
        """Return the folders that the paths in a source start from: those of its files."""
        return folders_of_files(name)

    def check(self, files: Sequence[Path]) -> list[Recording | DataError]:
        """Return digests and lengths of recordings, or what is wrong with them."""
        return check_recordings(files)

    def rest(self, values: Mapping[str, Any]) -> str:
        """Return a row's text."""
        return text_in(values, TEXT)

    def stored(self, named: Named, rest: str, checked: Recording) -> Stored:
        """Return the tokens of a row's text; nothing if its recording is longer than the model hears."""
        digest = digest_of(checked.digest, rest.encode())
        stored = Stored(int.from_bytes(checked.digest[:8], "little"), digest)
        if checked.seconds > self.longest:
            stored.counts.dropped_long += 1
            return stored
        ids = self._targets(rest, stored.counts)
        if ids is None:
            return stored
        labels = ids[1:]  # without the token that upstream puts before them
        if len(labels) > self._max_targets:
            raise DataError(
                f"the text takes {len(labels)} tokens, and the model has positions for {self._max_targets}; set "
                f"objective.max_target_length to at most {self._max_targets}"
            )
        item = {AUDIO: named.name, FOLDER: named.folder, LABELS: labels, TARGET: rest}
        stored.keep(item, self._num_positions + len(labels), len(labels))
        return stored

    def rows(self, data: Dataset) -> ColumnRows:
        """Return stored recordings as rows."""
        return ColumnRows(data, self._collate)

    def _collate(self, rows: Sequence[Mapping[str, Any]], numbers: tuple[int, ...], at: int) -> dict[str, torch.Tensor]:
        labels = padded([row[LABELS] for row in rows], IGNORE)
        return {
            FEATURES: torch.stack([self._spectrogram(row) for row in rows]), LABELS: labels,
            SUPERVISED: learned_positions(labels),
        }  # fmt: skip

    def _spectrogram(self, row: Mapping[str, Any]) -> torch.Tensor:
        """Return upstream's log-mel spectrogram of a row, float32 ``[bins, frames]``.

        Each is computed alone, so that its bits do not depend on the others in its batch.
        """
        rate = self._extractor.sampling_rate
        samples = read_recording(self.folders.file(int(row[FOLDER]), str(row[AUDIO])), rate)
        return self._extractor(samples, sampling_rate=rate, return_tensors="pt")[FEATURES][0]

    def segments(self, rows: Rows, number: int) -> list[Segment]:
        """Return a row's path, and its text as what is learned."""
        assert isinstance(rows, ColumnRows)
        row = rows.row(number)
        shown = str(self._tokenizer.decode(row[LABELS]))
        return [Segment(f"{row[AUDIO]} ", False, self._num_positions), Segment(shown, True, len(row[LABELS]))]
