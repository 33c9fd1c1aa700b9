"""`export`: the adapter of a run's checkpoint as a plain PEFT folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from fsdp_qlora.checkpoint.checkpointer import open_checkpoint
from fsdp_qlora.checkpoint.publish import complete_checkpoints
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.errors import CheckpointError, StorageError
from fsdp_qlora.track.run_folder import RunFolder


def run(config: RunConfig) -> int:
    """Export; return the exit code."""
    folder = RunFolder(config.run.output_root, config.run.name)
    if config.export.checkpoint:
        source = Path(config.export.checkpoint).expanduser()
    else:
        found = complete_checkpoints(folder.checkpoints)
        if not found:
            raise CheckpointError(f"{folder.checkpoints} holds no complete checkpoint; give export.checkpoint=FOLDER.")
        source = found[-1]
    _, manifest = open_checkpoint(source)
    target = Path(config.export.to).expanduser() if config.export.to else folder.adapter
    try:
        shutil.copytree(source / "adapter", target, dirs_exist_ok=True)
    except OSError as error:
        raise StorageError(f"export.to: {target} cannot be written: {error}") from error
    print(f"step {manifest.step} of {source} -> {target}")
    return 0
