"""WAV files: checked when rows are prepared, read when a batch is built. Needs scipy (the extra ``audio``)."""

from __future__ import annotations

import io
import math
import shlex
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fsdp_qlora.data.named_files import content_digest, content_of, each_checked
from fsdp_qlora.errors import DataError, first_line

LOWEST, HIGHEST = 4_000, 192_000
"""Sampling rates that are read, in Hz; a filter for odd ones would be as long as the recording."""
_CUT_OFF = "Reached EOF prematurely"
"""How scipy's warning of a truncated file begins."""


class Recording(NamedTuple):
    """What is kept of a recording that was checked."""

    digest: bytes
    """Digest of the whole file."""
    seconds: float


def check_recordings(files: Sequence[Path]) -> list[Recording | DataError]:
    """Check on all cores that files are WAV files which can be read; return what is wrong with those that are not."""
    from scipy.io.wavfile import WavFileWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", WavFileWarning)  # of chunks that are no sound
        warnings.filterwarnings("error", _CUT_OFF, WavFileWarning)
        return each_checked(files, "recording", _checked)


def _checked(file: Path, content: bytes) -> Recording:
    rate, samples = _decoded(file, content)
    return Recording(content_digest(content), len(samples) / rate)


def read_recording(file: Path, rate: int) -> np.ndarray:
    """Return a recording as float32 ``[samples]`` between -1 and 1, one channel, ``rate`` samples a second.

    Several channels are averaged. Another rate is converted by `scipy.signal.resample_poly`.

    Raises:
        DataError: if it cannot be read.
    """
    own, samples = _decoded(file, content_of(file, "recording"))
    if samples.ndim > 1:
        samples = samples.mean(axis=1)
    if own != rate:
        from scipy.signal import resample_poly

        common = math.gcd(own, rate)
        samples = resample_poly(samples, rate // common, own // common)
    return samples.astype(np.float32)


def _decoded(file: Path, content: bytes) -> tuple[int, np.ndarray]:
    """Return a recording's rate, and its samples between -1 and 1, float64 ``[samples]`` or ``[samples, channels]``.

    Raises:
        DataError: if it is no WAV file, or not whole.
    """
    from scipy.io import wavfile

    if content[:4] not in (b"RIFF", b"RIFX", b"RF64"):
        raise DataError(f"{file} is no WAV file, and only those are read; convert it: {_command(file)}")
    try:
        rate, samples = wavfile.read(io.BytesIO(content))
    except Warning as error:  # those that `check_recordings` turns into errors
        raise DataError(
            f"the recording {file} ends before its header says (a copy that was broken off, or a file that was written "
            f"to a pipe); if it is whole, let its header be written again: {_command(file)}"
        ) from error
    except Exception as error:  # scipy has many, some of them by accident
        raise DataError(
            f"the recording {file} cannot be read: {first_line(error)}. If a player plays it, convert it: "
            f"{_command(file)}"
        ) from error
    if not LOWEST <= rate <= HIGHEST:
        raise DataError(f"the recording {file} has {rate} samples a second; from {LOWEST} to {HIGHEST} are read")
    if not len(samples):
        raise DataError(f"the recording {file} has no samples")
    if samples.dtype == np.uint8:
        return rate, (samples.astype(np.float64) - 128) / 128
    if np.issubdtype(samples.dtype, np.integer):
        return rate, samples / -float(np.iinfo(samples.dtype).min)
    if not np.isfinite(samples).all():
        raise DataError(f"the recording {file} has samples that are not finite")
    return rate, samples.astype(np.float64)


def _command(file: Path) -> str:
    return f"ffmpeg -i {shlex.quote(str(file))} -ac 1 -ar 16000 {shlex.quote(f'{file.stem}_16k.wav')}"
