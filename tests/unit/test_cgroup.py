"""R8: a job's memory is the smallest limit of its control groups, of version 1 and 2, one inside the other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fsdp_qlora.distributed.cgroup import memory_limit

GIB = 2**30
V1 = "34 31 0:31 {root} {mount} rw,relatime - cgroup cgroup rw,memory"
V2 = "29 23 0:26 {root} {mount} rw,nosuid - cgroup2 cgroup rw,nsdelegate"
OTHER = "35 31 0:33 / {mount}/../cpu rw,relatime - cgroup cgroup rw,cpu,cpuacct"


def _found(tmp_path: Path, mount: str, group: str, limits: dict[str, str], root: str = "/") -> int | None:
    """Return the limit for a process of ``group``; ``limits``: path below the mount point -> what the file says."""
    process, hierarchy = tmp_path / "proc", tmp_path / "memory"
    process.mkdir()
    (process / "mountinfo").write_text("\n".join(line.format(mount=hierarchy, root=root) for line in (OTHER, mount)))
    (process / "cgroup").write_text(f"3:cpu,cpuacct:/elsewhere\n{group}\n")
    for path, text in limits.items():
        file = hierarchy / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    return memory_limit(process)


def test_the_smallest_limit_on_the_way_to_the_root_counts(tmp_path):
    limits = {
        "slurm/job_7/memory.max": str(6 * GIB), "slurm/job_7/step_0/memory.max": str(9 * GIB),
        "slurm/job_7/step_0/task_0/memory.max": "max", "slurm/job_8/memory.max": str(GIB),
    }  # fmt: skip
    assert _found(tmp_path, V2, "0::/slurm/job_7/step_0/task_0", limits) == 6 * GIB


def test_version_1_is_read_too(tmp_path):
    limits = {
        "memory.limit_in_bytes": "9223372036854771712", "job/memory.limit_in_bytes": str(3 * GIB),
        "job/step/memory.limit_in_bytes": str(5 * GIB),
    }  # fmt: skip
    assert _found(tmp_path, V1, "4:memory:/job/step", limits) == 3 * GIB


def test_what_a_container_sees_begins_at_its_own_group(tmp_path):
    limits = {"memory.max": str(2 * GIB), "inner/memory.max": str(4 * GIB)}
    assert _found(tmp_path, V2, "0::/docker/abc/inner", limits, root="/docker/abc") == 2 * GIB


def test_a_group_that_is_not_seen_counts_as_the_mount_point(tmp_path):
    assert _found(tmp_path, V1, "4:memory:/host/only", {"memory.limit_in_bytes": str(GIB)}, root="/docker/abc") == GIB


@pytest.mark.parametrize("limits", [{}, {"memory.max": "max"}, {"memory.max": ""}])
def test_no_limit_is_none(tmp_path, limits):
    assert _found(tmp_path, V2, "0::/", limits) is None


def test_another_system_has_no_limit(tmp_path):
    assert memory_limit(tmp_path / "nothing") is None


@pytest.fixture
def real_group():
    """A control group of this machine's with 3 GiB, in a group of 2 GiB: as a job with steps has them."""
    for top, name in (("/sys/fs/cgroup", "memory.max"), ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")):
        if not (Path(top) / "cgroup.procs").is_file():
            continue
        outer = Path(top) / f"fsdp_qlora_test_{os.getpid()}"
        inner = outer / "step"
        try:
            inner.mkdir(parents=True)
            (outer / name).write_text(str(2 * GIB))
            (inner / name).write_text(str(3 * GIB))
        except OSError:
            for folder in (inner, outer):
                if folder.is_dir():
                    folder.rmdir()
            continue
        yield inner
        inner.rmdir()
        outer.rmdir()
        return
    pytest.skip("this user may make no control group that limits memory")


def test_a_process_in_a_real_group_sees_its_limit(real_group, cli_env):
    code = (
        "import os, pathlib, sys, torch\n"
        f"pathlib.Path({str(real_group)!r}, 'cgroup.procs').write_text(str(os.getpid()))\n"
        "from fsdp_qlora.distributed.memory import host_memory, memory_of\n"
        "print(host_memory()[0], memory_of(torch.device('cpu'), 2))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=cli_env, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [str(2 * GIB), str(GIB)], done.stderr
