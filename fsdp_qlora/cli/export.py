"""`export`: writes a checkpoint's adapter as a plain PEFT folder, the base in 4 bits, or both merged in 16 bits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel

from fsdp_qlora.adapters.based import fingerprint_in, require_same_base, require_targets
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
from fsdp_qlora.export.adapter import copy_adapter, copy_folder
from fsdp_qlora.export.combined import combine_adapters
from fsdp_qlora.export.quantized_base import export_base, written_in_4_bits
from fsdp_qlora.export.starts import StartedAdapter, measure, write_for_its_base, write_plain_lora
from fsdp_qlora.export.vllm import rewrite_for_vllm, served_by_vllm
from fsdp_qlora.load.conversions import arrangement
from fsdp_qlora.load.fingerprint import Base
from fsdp_qlora.load.safetensors import SafetensorsFolder
from fsdp_qlora.model.folder import resolve_folder
from fsdp_qlora.model.skeleton import build_skeleton, read_shapes
from fsdp_qlora.parallel.shard import model_dtype
from fsdp_qlora.plan.quantized import format_of
from fsdp_qlora.quant.formats import Packed
from fsdp_qlora.run.folder import RunFolder
from fsdp_qlora.run.merge import merge
from fsdp_qlora.run.world import open_world
from fsdp_qlora.shapes.linears import ModelShapes
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
    adapter = _started(config) if config.adapter else None
    quant_format = format_of(config.quant)
    if adapter is not None and (odd := [n for n, kind in adapter.formats.items() if kind != quant_format]):
        kind = adapter.formats[odd[0]]
        raise ConfigError(
            f"quant: the adapter in {adapter.folder} was trained with {odd[0]} in "
            f"{'16 or 32 bits' if kind is None else kind.describe()}, not in {quant_format.describe()}. Set what it "
            "was trained with, or convert it with what=adapter export.plain_lora=true."
        )
    base, source, name = _base_of(config, adapter)
    shapes = read_shapes(base)
    if adapter is not None:
        _require_its_base(adapter, _opened(base, source), shapes)
    target = Path(config.export.to).expanduser()
    done = export_base(
        base, source, target, quant_format, device,
        loading("quantizing and writing"),
        taken=adapter.taken if adapter else lambda _: None,
    )  # fmt: skip
    print(f"{name} -> {target}: {done.quantized} linears in {config.quant.name}, {megabytes(done.num_bytes)}")
    if adapter is None:
        print(f"train from it: {command('train', f'model.name={target}')} ...")
        return 0
    packed = [Packed(x, quant_format) for x in written_in_4_bits(shapes)]
    write_for_its_base(adapter, target / ADAPTER_FOLDER, Base(_opened(base, target), shapes, packed))
    print(f"{adapter.folder} -> {target / ADAPTER_FOLDER}: the adapter for this base, which its start was taken off")
    return 0


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


def _opened(base: PreTrainedModel, source: Path) -> SafetensorsFolder:
    files = SafetensorsFolder(source)
    files.arrange(arrangement(base, files.entries))
    return files


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
    assert config.export.to is not None  # check_verb
    base, source, name = _base_of(config, adapter)
    files, shapes = _opened(base, source), read_shapes(base)
    _require_its_base(adapter, files, shapes)
    difference = measure(adapter, {x.name: x for x in shapes.linears}, files)
    target = Path(config.export.to).expanduser()
    size = write_plain_lora(adapter, target)
    print(f"{adapter.folder} -> {target}: a plain LoRA of rank {2 * adapter.config.r} for {name}, {megabytes(size)}")
    print(
        f"weights differ from the trained model's by {difference.on_original:.2e} of their size on the original base, "
        f"and by {difference.on_quantized:.2e} on that base quantized as in training (root mean squares)"
    )
    return 0


def _merged(config: RunConfig) -> int:
    assert config.export.to is not None  # check_verb
    target = Path(config.export.to).expanduser()
    assert not isinstance(config.adapter, dict)  # check_verb
    adapter = Path(config.adapter).expanduser() if config.adapter else _with_adapter(config) / ADAPTER_FOLDER
    world = open_world(config)
    with world.stack:
        done = merge(config, adapter, target, world, loading("folding and writing"))
    written = f"{done.written.folded} linears folded, {megabytes(done.written.num_bytes)}"
    written += f" ({done.rounded} in the base's files, rounded to {done.dtype})" if done.rounded else ""
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


def _combined(config: RunConfig, adapters: dict[str, str]) -> int:
    """Make one adapter of several, and say how far it is from their weighted sum."""
    export = config.export
    assert export.to is not None  # check_verb
    target = Path(export.to).expanduser()
    folders = {name: Path(folder).expanduser() for name, folder in adapters.items()}
    done = combine_adapters(folders, export.weights, export.combination, target, export.rank)
    sum_of = " + ".join(f"{export.weights[name]:g} x {name}" for name in folders)
    print(f"{sum_of} -> {target}: {done.modules} linears, ranks up to {done.r}, {megabytes(done.num_bytes)}")
    far = f"{done.difference:.2e} of its size (root mean squares)"
    print(f"{export.combination}: differs from that sum of changes by {far}")
    return 0


def _written(config: RunConfig, target: Path, copy: Callable[[], None], what: str) -> int:
    """Copy an adapter to ``target``, and say whether vLLM serves it."""
    try:
        copy()
        if config.export.for_vllm:
            rewrite_for_vllm(target)
    except OSError as error:
        raise StorageError(f"export.to: {target} cannot be written: {error}") from error
    print(f"{what} -> {target}")
    print(served_by_vllm(target))
    return 0


def _adapter(config: RunConfig) -> int:
    if isinstance(config.adapter, dict):
        return _combined(config, config.adapter)
    if config.adapter and config.export.plain_lora:
        return _plain_lora(config, _started(config))
    if config.adapter:
        assert config.export.to is not None  # check_verb
        adapter, target = Path(config.adapter).expanduser(), Path(config.export.to).expanduser()
        return _written(config, target, partial(copy_folder, adapter, target), str(adapter))
    folder = RunFolder(config.run.output_root, config.run.name)
    source = _with_adapter(config)
    manifest = open_checkpoint(source).manifest
    if config.export.plain_lora:
        return _plain_lora(config, StartedAdapter(source / ADAPTER_FOLDER))
    target = Path(config.export.to).expanduser() if config.export.to else folder.adapter
    if target == folder.adapter and target.is_symlink():
        raise SecurityError(f"{target} is a link; links are not followed here. Name the folder with export.to.")
    copy = partial(copy_adapter, source, manifest, target)
    return _written(config, target, copy, f"step {manifest.step} of {source}")


EXPORTS: choices.Table[Callable[[RunConfig], int]] = choices.Table(
    "what", {"adapter": _adapter, "base-4bit": _base_4bit, "merged": _merged}
)
"""The exports of ``export what=``."""
