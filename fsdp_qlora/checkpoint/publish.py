"""The file operations that publish a checkpoint atomically.

A checkpoint is written to a fresh ``.saving_`` folder, synced, and renamed to ``step_<step>``. It counts only with its
COMPLETE file, which is written last and holds the sha256 of manifest.json. If a kill interrupts these steps, the names
show how far they got, and `tidy` finishes or undoes them at the next start.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from fsdp_qlora.checkpoint.manifest import COMPLETE, MANIFEST, Manifest
from fsdp_qlora.errors import SecurityError
from fsdp_qlora.files.read import file_sha256
from fsdp_qlora.files.write import sync, write_text

STEP_FOLDER = re.compile(r"step_(\d{8})")
LATEST = "latest"
_SAVING, _REMOVING, _REPLACED = ".saving_", ".removing_", ".replaced_"
_OURS = re.compile(rf"({re.escape(_SAVING)}|{re.escape(_REMOVING)})step_\d{{8}}")


def step_folder(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint of ``step``."""
    return folder / f"step_{step:08d}"


def is_complete(folder: Path) -> bool:
    """Whether a folder is a completely written checkpoint."""
    return STEP_FOLDER.fullmatch(folder.name) is not None and (folder / COMPLETE).is_file()


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in ``folder`` that have their COMPLETE file, oldest first.

    Raises:
        SecurityError: if the folder or one of them is a link: in a stranger's run folder, it may lead to yours.
    """
    complete = sorted(f for f in folder.iterdir() if is_complete(f)) if folder.is_dir() else []
    for place in (folder, *complete):
        if place.is_symlink():
            raise SecurityError(f"{place} is a link; links are not followed here. Pass the checkpoint's real path.")
    return complete


def staging_for(target: Path) -> Path:
    """Return the temporary folder in which ``target`` is written."""
    return target.with_name(_SAVING + target.name)


def make_fresh(staging: Path) -> None:
    """Create an empty folder, deleting an old one of that name."""
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)


def publish(staging: Path, target: Path, manifest: Manifest) -> None:
    """Turn a written folder into the checkpoint ``target``; an older one of that name is only deleted afterwards."""
    manifest.write(staging)
    for folder in (staging, *(f for f in staging.iterdir() if f.is_dir())):
        sync(folder)
    replaced = target.with_name(_REPLACED + target.name)
    if target.exists():  # from another attempt at this step; `tidy` restores it if we die before COMPLETE
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    staging.rename(target)
    write_text(target / COMPLETE, file_sha256(target / MANIFEST, follow=False) + "\n")
    sync(target)
    sync(target.parent)
    if replaced.exists():
        shutil.rmtree(replaced, ignore_errors=True)  # `tidy` tries again and reports failures
    write_text(target.parent / LATEST, target.name + "\n")  # for users and scripts; we never read it


def remove(checkpoint: Path) -> str | None:
    """Delete a checkpoint and the remains of earlier deletions; return what could not be deleted and why, or None.

    If the process is killed meanwhile, the checkpoint is either intact or already renamed away.
    """
    trash = checkpoint.with_name(_REMOVING + checkpoint.name)
    try:
        if trash.exists():
            shutil.rmtree(trash)
        checkpoint.rename(trash)
    except OSError as error:
        return f"{checkpoint}: {error.strerror}"
    problems = [_delete(left) for left in checkpoint.parent.glob(f"{_REMOVING}*") if _OURS.fullmatch(left.name)]
    return next(filter(None, problems), None)


def _delete(folder: Path) -> str | None:
    """Delete as much of a folder as possible; return what could not be deleted and why, or None."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        return f"{folder}: {error.strerror}" if folder.exists() else None
    return None


def tidy(folder: Path) -> list[str]:
    """Finish or undo what a killed process left half done; only our own names are touched.

    Only the process that holds the run folder's lock may call it. Returns what could not be deleted and why.
    """
    problems: list[str | None] = []
    for left in list(folder.iterdir()) if folder.is_dir() else []:
        if _OURS.fullmatch(left.name):
            problems.append(_delete(left))
        elif left.name.startswith(_REPLACED) and STEP_FOLDER.fullmatch(left.name.removeprefix(_REPLACED)):
            target = folder / left.name.removeprefix(_REPLACED)
            if is_complete(target):
                problems.append(_delete(left))
                continue
            if target.exists():
                problems.append(remove(target))
            left.rename(target)
    return [problem for problem in problems if problem is not None]


def set_aside(folder: Path, after_step: int) -> list[Path]:
    """Rename checkpoints newer than ``after_step``, which the run does not resume from; return their new paths.

    Otherwise a later resume would take them for the newest of this run.
    """
    moved = []
    for newer in [f for f in complete_checkpoints(folder) if int(f.name[5:]) > after_step]:
        number = 1
        while (target := folder / f"set_aside_{newer.name}.{number}").exists():
            number += 1
        moved.append(newer.rename(target))
    return moved
