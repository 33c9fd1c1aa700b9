"""Who may read a file that is given away: for the umask to say, as with any new file."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path


def open_as_a_new_file(file: Path) -> None:
    """Give ``file`` the mode of a new one beside it; safetensors leaves 0600, whatever the umask.

    Nothing happens where the file system knows no modes. (The umask itself can only be read by setting it, for all
    threads.)
    """
    with suppress(OSError), tempfile.TemporaryDirectory(dir=file.parent, prefix=".mode-") as folder:
        sample = Path(folder) / "new"
        sample.touch()
        file.chmod(sample.stat().st_mode & 0o777)
