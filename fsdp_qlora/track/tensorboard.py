"""TensorBoard as a sink: event files in the run folder. Needs the extra ``tensorboard``.

Written by `torch.utils.tensorboard`, which comes with torch and writes through TensorBoard's own code, so the package
that reads the files is the one that writes them (`docs/tracking.md` says why not tensorboardX).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fsdp_qlora.track.sink import Ended, Sink, numbers

FOLDER = "tensorboard"
"""The event files' folder inside the run folder."""


class TensorBoardSink(Sink):
    """Writes each value of a step as a scalar of that name."""

    def __init__(self, folder: Path, config: dict[str, Any], step: int) -> None:
        """Continue the event files of a run after ``step``; what they hold of later steps is hidden."""
        self._folder = folder / FOLDER
        self._writer = self._open(step)
        self._text("config", config, step)

    def _open(self, step: int) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        # From the purged step on, readers drop what earlier files hold.
        return SummaryWriter(str(self._folder), purge_step=step + 1 if step else None)

    def _text(self, tag: str, value: Any, step: int) -> None:
        # Indented: TensorBoard takes texts for Markdown, in which that is code.
        text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
        self._writer.add_text(tag, "".join(f"    {line}\n" for line in text.splitlines()), step)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Write the values; those that are no numbers together as a text."""
        plain = numbers(values)
        for name, value in plain.items():
            # In float32. Doubles would be tensors, of which `EventAccumulator` does not hide what is run again.
            self._writer.add_scalar(name, value, step)
        if rest := {name: value for name, value in values.items() if name not in plain}:
            self._text("notes", rest, step)
        self._writer.flush()

    def rewind(self, step: int) -> None:
        """Hide what was written for later steps."""
        self._writer.close()
        self._writer = self._open(step)

    def close(self) -> None:
        """Write out what is pending."""
        self._writer.flush()

    def end(self, ended: Ended) -> None:
        """Write the summary and close the file."""
        if ended.summary:
            self._text("summary", ended.summary, ended.summary.get("steps", 0))
        self._writer.close()
