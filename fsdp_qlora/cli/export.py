"""`export`: writes a checkpoint's adapter as a plain PEFT folder, the base in 4 bits, or both merged in 16 bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fsdp_qlora.checkpoint.checkpointer import open_checkpoint
from fsdp_qlora.checkpoint.manifest import Manifest
from fsdp_qlora.checkpoint.publish import complete_checkpoints
from fsdp_qlora.checkpoint.verify import ADAPTER_FOLDER
from fsdp_qlora.cli.quoting import command
from fsdp_qlora.cli.show import loading
from fsdp_qlora.config import choices
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.distributed.process import Placement, choose_device, use_device
from fsdp_qlora.errors import CheckpointError, ConfigError, SecurityError, StorageError
from fsdp_qlora.export.adapter import copy_adapter
from fsdp_qlora.export.quantized_base import export_base
from fsdp_qlora.model.folder import resolve_folder
from fsdp_qlora.model.skeleton import build_skeleton
from fsdp_qlora.parallel.shard import model_dtype
from fsdp_qlora.plan.quantized import format_of
from fsdp_qlora.run.folder import RunFolder
from fsdp_qlora.run.merge import merge
from fsdp_qlora.run.world import open_world
from fsdp_qlora.track.console import megabytes


def run(config: RunConfig) -> int:
    """Export; return the exit code."""
    return EXPORTS[config.what](config)


def _base_4bit(config: RunConfig) -> int:
    assert config.export.to is not None and config.quant.name != "none"  # check_verb
    placement = Placement.from_env()
    if placement.world_size > 1:
        raise ConfigError("what=base-4bit: runs in one process; start it without torchrun.")
    device = choose_device(config.launcher.device, placement)
    use_device(device)
    source, target = resolve_folder(config.model.name, config.model.revision), Path(config.export.to).expanduser()
    base = build_skeleton(source, model_dtype(config.precision.name), "eager", config.model.trust_remote_code)
    done = export_base(
        base, source, target, format_of(config.quant), device,
        loading("quantizing and writing"),
    )  # fmt: skip
    print(
        f"{config.model.name} -> {target}: {done.quantized} linears in {config.quant.name}, {megabytes(done.num_bytes)}"
    )
    print(f"train from it: {command('train', f'model.name={target}')} ...")
    return 0


def _merged(config: RunConfig) -> int:
    assert config.export.to is not None  # check_verb
    target = Path(config.export.to).expanduser()
    adapter = Path(config.adapter).expanduser() if config.adapter else _with_adapter(config) / ADAPTER_FOLDER
    world = open_world(config)
    with world.stack:
        done = merge(config, adapter, target, world, loading("folding and writing"))
    written = f"{done.written.folded} linears folded, {megabytes(done.written.num_bytes)}"
    print(f"{done.base} + {adapter} -> {target}: {written}")
    print(f"folded into the {done.form} base ({done.why}); the largest tensor took {megabytes(done.memory)}")
    return 0


def _with_adapter(config: RunConfig) -> Path:
    """Return the checkpoint to export from, which has an adapter."""
    folder = RunFolder(config.run.output_root, config.run.name)
    source = _newest(config, folder)
    if Manifest.read(source).identity.get("lora.variant") == choices.NONE:
        raise ConfigError(
            f"what={config.what}: {source} is of a run with lora=none, which trains the base and no adapter; its "
            f"result is {folder.model}, a model that it writes when it ends."
        )
    return source


def _newest(config: RunConfig, folder: RunFolder) -> Path:
    if config.export.checkpoint:
        return Path(config.export.checkpoint).expanduser()
    checkpoints = complete_checkpoints(folder.checkpoints)
    if not checkpoints:
        raise CheckpointError(f"{folder.checkpoints} holds no complete checkpoint; set export.checkpoint=FOLDER.")
    return checkpoints[-1]


def _adapter(config: RunConfig) -> int:
    folder = RunFolder(config.run.output_root, config.run.name)
    source = _with_adapter(config)
    manifest = open_checkpoint(source).manifest
    target = Path(config.export.to).expanduser() if config.export.to else folder.adapter
    if target == folder.adapter and target.is_symlink():
        raise SecurityError(f"{target} is a link; links are not followed here. Name the folder with export.to.")
    try:
        copy_adapter(source, manifest, target)
    except OSError as error:
        raise StorageError(f"export.to: {target} cannot be written: {error}") from error
    print(f"step {manifest.step} of {source} -> {target}")
    return 0


EXPORTS: choices.Table[Callable[[RunConfig], int]] = choices.Table(
    "what", {"adapter": _adapter, "base-4bit": _base_4bit, "merged": _merged}
)
"""The exports of ``export what=``."""
