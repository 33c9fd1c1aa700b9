"""The memory that this process may take: the smallest limit on the way from its control groups to the root.

SLURM, systemd and containers limit a job's memory by control groups, in version 1 and 2, one inside the other; who
takes more is killed (the kernel's documentation: admin-guide/cgroup-v1/memory.rst, admin-guide/cgroup-v2.rst).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_FILES = {"cgroup2": "memory.max", "cgroup": "memory.limit_in_bytes"}
"""File of the limit, by the type of the file system."""


def memory_limit(process: Path = Path("/proc/self")) -> int | None:
    """Return the limit in bytes, None where there is none (or this is no Linux).

    Version 1 writes a number near 2**63 where nothing is limited; it is returned as it is.
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
    """Yield (file of the limit, mount point, folder of the group in it) of each hierarchy that limits memory."""
    own = [line.split(":", 2) for line in groups if line.count(":") >= 2]
    for mount in mounts:
        before, _, after = mount.partition(" - ")
        _, _, _, root, point, *_ = before.split()
        kind, _, options = [*after.split(), "", "", ""][:3]
        for number, controllers, path in own:
            version_2 = kind == "cgroup2" and number == "0" and not controllers
            version_1 = kind == "cgroup" and "memory" in options.split(",") and "memory" in controllers.split(",")
            if version_1 or version_2:
                # What a container sees of the hierarchy begins at ``root``; a group outside of it is not seen.
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
