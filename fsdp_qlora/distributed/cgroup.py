"""The memory limit of this process: the smallest limit of its control groups and their ancestors.

SLURM, systemd and containers limit a job's memory with nested control groups (v1 or v2); a process that exceeds the
limit is killed (kernel documentation: admin-guide/cgroup-v1/memory.rst, admin-guide/cgroup-v2.rst).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_FILES = {"cgroup2": "memory.max", "cgroup": "memory.limit_in_bytes"}
"""File system type -> name of the file with the limit."""


def memory_limit(process: Path = Path("/proc/self")) -> int | None:
    """Return the limit in bytes, or None if there is none (or this is not Linux).

    Version 1 reports a number near 2**63 if there is no limit; it is returned unchanged.
    """
    try:
        groups = (process / "cgroup").read_text().splitlines()
        mounts = (process / "mountinfo").read_text().splitlines()
    except OSError:
        return None
    limits = [
        _limit(folder / name) for name, top, group in _memory_groups(groups, mounts) for folder in _up(top, group)
    ]
    return min((limit for limit in limits if limit is not None), default=None)


def _memory_groups(groups: list[str], mounts: list[str]) -> Iterator[tuple[str, Path, Path]]:
    """Yield (name of the limit's file, mount point, folder of the group) for each hierarchy that controls memory."""
    own = [line.split(":", 2) for line in groups if line.count(":") >= 2]
    for mount in mounts:
        before, _, after = mount.partition(" - ")
        _, _, _, root, point, *_ = before.split()
        kind, _, options = [*after.split(), "", "", ""][:3]
        for number, controllers, path in own:
            version_2 = kind == "cgroup2" and number == "0" and not controllers
            version_1 = kind == "cgroup" and "memory" in options.split(",") and "memory" in controllers.split(",")
            if version_1 or version_2:
                # A container's view of the hierarchy starts at ``root``; for a group outside it, use the mount point.
                group = Path(path)
                inside = group.relative_to(root) if group.is_relative_to(root) else Path()
                yield _FILES[kind], Path(point), Path(point) / inside


def _up(top: Path, folder: Path) -> Iterator[Path]:
    yield folder
    yield from (parent for parent in folder.parents if parent.is_relative_to(top))


def _limit(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None  # "max": no limit
