"""Checks that the base model's files are byte for byte those that a checkpoint was trained on."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fsdp_qlora.checks.digests import WholeDigests
from fsdp_qlora.distributed.nodes import once_per_node
from fsdp_qlora.distributed.reduce import any_rank, on_every
from fsdp_qlora.errors import ConfigError, StorageError
from fsdp_qlora.files.home import cache_folder
from fsdp_qlora.load.safetensors import weight_files
from fsdp_qlora.run.prepared import Prepared

_log = logging.getLogger(__name__)


class BaseFiles:
    """Digests of the base model's files; on each node, the first rank computes those of its files."""

    def __init__(self, prepared: Prepared) -> None:
        self._prepared, self._ranks = prepared, prepared.ranks
        self._local_rank = prepared.placement.local_rank
        self._digests = WholeDigests(weight_files(prepared.folder), _kept())

    def known(self) -> dict[str, str]:
        """Return the whole-file digests known so far."""
        return dict(self._digests.known)

    def begin(self) -> None:
        """Start to compute the missing digests in the background."""
        if self._local_rank == 0:
            self._digests.begin()

    def close(self) -> None:
        """Stop the background work."""
        self._digests.close()

    def compare(self, saved: Mapping[str, Any], checkpoint: Path) -> None:
        """Compare the files with the whole-file digests in a checkpoint, computing missing ones first.

        Every rank calls it.

        Raises:
            ConfigError: identically on every rank, naming the first file that differs.
        """
        digests, ranks = self._digests, self._ranks
        if any_rank(self._local_rank == 0 and digests.missing(saved), ranks):
            self._ranks.phases.enter("hashing the base model's files")
            if ranks.is_main:
                _log.warning("hashing the base model's files to compare them with those of %s", checkpoint)
            once_per_node(lambda: digests.make(saved), ranks, self._local_rank, lambda _: None)
        on_every(lambda: digests.compare(saved, checkpoint), ranks)


def _kept() -> Path | None:
    try:
        return cache_folder() / "digests"
    except (ConfigError, StorageError):  # no home folder: every run computes them again
        return None
