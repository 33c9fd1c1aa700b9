"""`export`: writes an adapter as a plain PEFT folder, the base in 4 bits, or both, in one folder or merged."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from fsdp_qlora.adapters.based import fingerprint_in, require_same_base, require_targets
from fsdp_qlora.checkpoint.checkpointer import open_checkpoint
from fsdp_qlora.checkpoint.manifest import Manifest
from fsdp_qlora.checkpoint.publish import complete_checkpoints
from fsdp_qlora.checkpoint.verify import ADAPTER_FOLDER
from fsdp_qlora.cli.quoting import command
from fsdp_qlora.config import choices
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.distributed.process import Placement, choose_device, use_device
from fsdp_qlora.errors import CheckpointError, ConfigError, SecurityError
from fsdp_qlora.export.adapter import copy_adapter, copy_folder
from fsdp_qlora.export.combined import combine_adapters
from fsdp_qlora.export.hub import require_login
from fsdp_qlora.export.model_folder import ADAPTER, BASE, new_folder, put, require_free
from fsdp_qlora.export.quantized_base import export_base, written_in_4_bits
from fsdp_qlora.export.served import require_fits
from fsdp_qlora.export.starts import StartedAdapter, measure, write_for_its_base, write_plain_lora
from fsdp_qlora.export.vllm import rewrite_for_vllm, served_by_vllm
from fsdp_qlora.load.fingerprint import Base
from fsdp_qlora.load.inventory import weights_of
from fsdp_qlora.load.safetensors import SafetensorsFolder
from fsdp_qlora.model.folder import resolve_folder
from fsdp_qlora.model.skeleton import build_skeleton, read_shapes
from fsdp_qlora.parallel.shard import model_dtype
from fsdp_qlora.plan.quantized import format_of
from fsdp_qlora.quant.formats import Packed
from fsdp_qlora.run.compare import compare_bases
from fsdp_qlora.run.folder import RunFolder
from fsdp_qlora.run.gguf import MODELFILE, GgufExport, export_gguf, export_gguf_adapter
from fsdp_qlora.run.held_out import Measured
from fsdp_qlora.run.merge import Merge, merge
from fsdp_qlora.run.push import push
from fsdp_qlora.run.serve import export_served
from fsdp_qlora.run.world import open_world, require_one_process
from fsdp_qlora.shapes.linears import ModelShapes
from fsdp_qlora.track.bars import Bar
from fsdp_qlora.track.console import megabytes


def run(config: RunConfig) -> int:
    """Export, and upload what was written if that is asked for; return the exit code."""
    if config.export.push is not None:
        require_login(config.export.push, config.export.overwrite)
    code = EXPORTS[config.what](config)
    if code == 0 and config.export.push is not None:
        _push(config)
    return code


def _push(config: RunConfig) -> None:
    folder = adapter = _target(config)
    if config.what != "adapter":
        adapter = None if config.what == "base-4bit" and not config.adapter else _adapter_folder(config)
    done = push(config, folder, adapter)
    print(f"{folder} -> {done.url}: {done.files} files")
    if done.base is None:
        print(
            "The repository names no base model: it is a folder of this machine. If it is on the hub, name it: "
            "model.name=OWNER/NAME."
        )


def _base_4bit(config: RunConfig) -> int:
    device, target = _device(config), _target(config)
    adapter = _started(config) if config.adapter else None
    quant_format = format_of(config.quant)
    assert quant_format is not None  # check_verb
    if adapter is not None:
        adapter.require_format(quant_format)
        require_fits(adapter, _base_of(config, adapter)[0])
        require_free(target, BASE, config.export.overwrite, (adapter.folder,))
    base, source, name = _base_of(config, adapter)
    shapes = read_shapes(base)
    if adapter is not None:
        _require_its_base(adapter, weights_of(base, source), shapes)

    def complete(staging: Path) -> None:
        if adapter is not None:
            packed = [Packed(x, quant_format) for x in written_in_4_bits(shapes)]
            its_base = Base(weights_of(base, staging), shapes, packed)
            write_for_its_base(adapter, staging / ADAPTER_FOLDER, its_base, target.absolute())

    done = export_base(
        base, source, target, quant_format, device,
        Bar("quantizing and writing"),
        taken=adapter.taken if adapter else lambda _: None, complete=complete,
        overwrite=config.export.overwrite,
    )  # fmt: skip
    print(f"{name} -> {target}: {done.quantized} linears in {config.quant.name}, {megabytes(done.num_bytes)}")
    if adapter is None:
        print(f"train from it: {command('train', f'model.name={target}')} ...")
        return 0
    print(f"{adapter.folder} -> {target / ADAPTER_FOLDER}: the adapter for this base, which its start was taken off")
    return 0


def _device(config: RunConfig) -> torch.device:
    """Choose the device for an export that runs in one process."""
    placement = Placement.from_env()
    require_one_process(config.what, placement.world_size)
    device = choose_device(config.launcher.device, placement)
    use_device(device)
    return device


def _started(config: RunConfig) -> StartedAdapter:
    assert isinstance(config.adapter, str)  # check_verb
    return StartedAdapter(Path(config.adapter).expanduser())


def _base_of(config: RunConfig, adapter: StartedAdapter | None) -> tuple[PreTrainedModel, Path, str]:
    """Return the base model on meta, its folder and its name: the settings', or else the adapter's.

    Raises:
        ConfigError: if neither names one.
    """
    model = config.model
    name, revision = model.name, model.revision
    if not name and adapter is not None and adapter.config.base_model:
        name, revision = adapter.config.base_model, revision or adapter.config.revision
    if not name:
        raise ConfigError("model.name: not set, and the adapter does not name its base.")
    source = resolve_folder(name, revision)
    return build_skeleton(source, model_dtype(config.precision.name), "eager", model.trust_remote_code), source, name


def _require_its_base(adapter: StartedAdapter, files: SafetensorsFolder, shapes: ModelShapes) -> None:
    """Check that an adapter was trained on these weights; what their format was, the conversions take into account.

    Raises:
        ModelError: if it was not, or it is not whole.
    """
    linears = {x.name: x for x in shapes.linears}
    packed = [Packed(linears[n], kind) for n, kind in adapter.formats.items() if kind is not None and n in linears]
    base = Base(files, shapes, packed)
    if (facts := fingerprint_in(adapter.folder)) is not None:
        require_same_base(adapter.folder, base, facts)
    require_targets(adapter.folder, base)


def _plain_lora(config: RunConfig, adapter: StartedAdapter) -> int:
    """Convert an adapter, and say what that changes."""
    base, source, name = _base_of(config, adapter)
    target = _target(config)
    require_free(target, ADAPTER, config.export.overwrite, (source, adapter.folder))
    files, shapes = weights_of(base, source), read_shapes(base)
    _require_its_base(adapter, files, shapes)
    difference = measure(adapter, {x.name: x for x in shapes.linears}, files)
    size = write_plain_lora(adapter, target, config.export.overwrite)
    print(f"{adapter.folder} -> {target}: a plain LoRA of rank {2 * adapter.config.r} for {name}, {megabytes(size)}")
    print(
        f"weights differ from the trained model's by {difference.on_original:.2e} of their size on the original base, "
        f"and by {difference.on_quantized:.2e} on that base quantized as in training (root mean squares)"
    )
    print(served_by_vllm(target))
    return 0


def _served(config: RunConfig) -> int:
    adapter, target = _adapter_folder(config), _target(config)
    done = export_served(config, adapter, target, _device(config), Bar("quantizing and writing"))
    size = f"{done.written.quantized} linears in {config.quant.name}, {megabytes(done.written.num_bytes)}"
    print(f"{done.base} + {adapter} -> {target}: {size}")
    if done.end is not None:
        print(f"answers end with the text {done.end!r}, which is no token: model.generate(..., tokenizer=tokenizer)")
    print(f"serve it: {shlex.join(['transformers', 'serve', str(target)])}")
    print(served_by_vllm(target, str(target)))
    return 0


def _adapter_folder(config: RunConfig) -> Path:
    """Return the adapter to export a model with: the one that is named, or that of the run's checkpoint."""
    assert not isinstance(config.adapter, dict)  # check_verb
    if config.adapter:
        return Path(config.adapter).expanduser()
    source = _with_adapter(config)
    open_checkpoint(source)  # verifies it
    return source / ADAPTER_FOLDER


def _merged(config: RunConfig) -> int:
    adapter, target = _adapter_folder(config), _target(config)
    world = open_world(config)
    with world.stack:
        done = merge(config, adapter, target, world, Bar("folding and writing"))
    stacks = f" and {done.written.stacks} stacks of experts" if done.written.stacks else ""
    written = f"{done.written.folded} linears{stacks} folded, {megabytes(done.written.num_bytes)}"
    written += f" ({done.rounded} in the base's files, rounded to {done.dtype})" if done.rounded else ""
    print(f"{done.base} + {adapter} -> {target}: {written}")
    print(_folded(done))
    _print_measured(done.compared, done.rows)
    print(f"vLLM: yes, like its base: {shlex.join(['vllm', 'serve', str(target)])}")
    return 0


def _print_measured(compared: Mapping[str, Measured], rows: int) -> None:
    for name, measured in compared.items():
        off = "" if measured.difference is None else f", largest logit difference {measured.difference:.4f}"
        print(f"{name}: loss {measured.loss:.4f} on {rows} held-out rows{off}")


def _compare_bases(config: RunConfig, adapter: Path) -> None:
    """Print what changes if an adapter is served on the original base, with ``export.compare``."""
    if not config.export.compare:
        return
    world = open_world(config)
    with world.stack:
        done = compare_bases(config, adapter, world)
    _print_measured({"trained model": done.trained, "on the 16-bit base": done.original}, done.rows)


def _folded(done: Merge) -> str:
    return f"folded into the {done.form} base ({done.why}); the largest tensor took {megabytes(done.memory)}"


def _gguf(config: RunConfig) -> int:
    """Convert a run's model: that of its adapter and base, or what it trained without one."""
    require_one_process(config.what, Placement.from_env().world_size)
    adapter, source, target = None, None, _target(config)
    if config.lora.trains_base and not config.adapter:
        source = RunFolder(config.run.output_root, config.run.name).model
        if not (source / "config.json").is_file():
            raise CheckpointError(f"{source} holds no model; a run with lora=none writes it when it ends.")
    else:
        adapter = _adapter_folder(config)
    world = open_world(config)
    with world.stack:
        done = export_gguf(config, adapter, source, target, world, _say)
    if done.merge is not None:
        print(_folded(done.merge))
    return _converted(done, adapter or source, target)


def _gguf_adapter(config: RunConfig) -> int:
    adapter, target = _adapter_folder(config), _target(config)
    require_one_process(config.what, Placement.from_env().world_size)
    return _converted(export_gguf_adapter(config, adapter, target, _say), adapter, target)


def _converted(done: GgufExport, source: Path | None, target: Path) -> int:
    for file in done.files:
        print(f"{source} -> {target / file.name}: {file.tensors} tensors, {megabytes(file.num_bytes)}")
    for note in done.notes:
        print(f"Modelfile: {note}")
    print(f"serve it: {shlex.join(['ollama', 'create', 'NAME', '-f', str(target / MODELFILE)])}")
    return 0


def _say(text: str) -> None:
    print(text, flush=True)


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


def _combined(config: RunConfig, adapters: dict[str, str]) -> int:
    """Make one adapter of several, and say how far it is from their weighted sum."""
    export, target = config.export, _target(config)
    folders = {name: Path(folder).expanduser() for name, folder in adapters.items()}
    require_free(target, ADAPTER, export.overwrite, folders.values())
    done = combine_adapters(folders, export.weights, export.combination, target, export.rank, export.overwrite)
    sum_of = " + ".join(f"{export.weights[name]:g} x {name}" for name in folders)
    print(f"{sum_of} -> {target}: {done.modules} linears, ranks up to {done.r}, {megabytes(done.num_bytes)}")
    far = f"{done.difference:.2e} of its size (root mean squares)"
    print(f"{export.combination}: differs from that sum of changes by {far}")
    print(served_by_vllm(target))
    return 0


def _written(config: RunConfig, target: Path, copy: Callable[[Path], None], what: str, overwrite: bool) -> int:
    """Copy an adapter to ``target``, and say whether vLLM serves it."""
    with new_folder(target, partial(put, overwrite=overwrite)) as staging:
        copy(staging)
        if config.export.for_vllm:
            rewrite_for_vllm(staging)
    print(f"{what} -> {target}")
    print(served_by_vllm(target))
    return 0


def _adapter(config: RunConfig) -> int:
    overwrite = config.export.overwrite
    if isinstance(config.adapter, dict):
        return _combined(config, config.adapter)
    if config.adapter and config.export.plain_lora:
        return _plain_lora(config, _started(config))
    if config.adapter:
        adapter, target = Path(config.adapter).expanduser(), _target(config)
        require_free(target, ADAPTER, overwrite, (adapter,))
        _compare_bases(config, adapter)
        return _written(config, target, partial(copy_folder, adapter), str(adapter), overwrite)
    folder = RunFolder(config.run.output_root, config.run.name)
    source = _with_adapter(config)
    manifest = open_checkpoint(source).manifest
    if config.export.plain_lora:
        return _plain_lora(config, StartedAdapter(source / ADAPTER_FOLDER))
    target = _target(config)
    own = target.absolute() == folder.adapter  # replaced without asking
    if own and target.is_symlink():
        raise SecurityError(f"{target} is a link; links are not followed here. Name the folder with export.to.")
    if not own:
        require_free(target, ADAPTER, overwrite, (source,))
    _compare_bases(config, source / ADAPTER_FOLDER)
    copy = partial(copy_adapter, source, manifest)
    return _written(config, target, copy, f"step {manifest.step} of {source}", overwrite or own)


def _target(config: RunConfig) -> Path:
    """Return the folder to write: ``export.to``, or, for an adapter, the run's own."""
    if config.export.to is not None:
        return Path(config.export.to).expanduser()
    return RunFolder(config.run.output_root, config.run.name).adapter


EXPORTS: choices.Table[Callable[[RunConfig], int]] = choices.Table(
    "what",
    {
        "adapter": _adapter,
        "base-4bit": _base_4bit,
        "merged": _merged,
        "served": _served,
        "gguf": _gguf,
        "gguf-adapter": _gguf_adapter,
    },
)
"""The exports of ``export what=``."""
