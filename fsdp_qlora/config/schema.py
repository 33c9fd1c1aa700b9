"""`RunConfig` and its groups: every setting of a run, with type, default and meaning.

Frozen dataclasses of plain values, without torch, hydra or omegaconf. Each group is a folder of ``conf/``; those of a
single verb are in `fsdp_qlora.config.verbs`. `fsdp-qlora VERB --help` prints the string under a field and its default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from fsdp_qlora.config import choices
from fsdp_qlora.config.auto import Auto, Switch
from fsdp_qlora.config.convert import build
from fsdp_qlora.config.facts import (
    BELOW_ONE,
    MAY_CHANGE,
    NOT_NEGATIVE,
    POSITIVE,
    RUNS_CODE,
    VERBATIM,
    YOUNGER,
    FormatOption,
)
from fsdp_qlora.config.lora import LoraSettings
from fsdp_qlora.config.objective import ObjectiveSettings
from fsdp_qlora.config.optim import OptimSettings, ScheduleSettings
from fsdp_qlora.config.saved import Saved
from fsdp_qlora.config.track import TrackSettings
from fsdp_qlora.config.train_settings import TrainSettings
from fsdp_qlora.config.verbs import EvaluateSettings, ExportSettings, GenerateSettings, PlanSettings, SweepSettings

QuantName = Annotated[str, choices.FORMATS, choices.NONE]
BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
"""Weights per block: bitsandbytes' sizes from 64 up. With 32, a nested block would cover only half a storage row."""


@dataclass(frozen=True)
class RunSettings:
    """Name, folder and seed of the run."""

    name: Annotated[str, VERBATIM] = "run"
    """Run name; the run folder is ``<output_root>/<name>``."""
    output_root: Annotated[str, VERBATIM] = "outputs"
    """Folder that holds all runs."""
    seed: Annotated[int, NOT_NEGATIVE] = 0
    """Seed for data order, adapter initialisation and dropout."""


@dataclass(frozen=True)
class ModelSettings:
    """The base model."""

    name: Annotated[str, VERBATIM, MAY_CHANGE] = ""
    """Hub id (``Qwen/Qwen3-8B``) or a folder with config.json and safetensors files."""
    revision: Annotated[str | None, MAY_CHANGE] = None
    """Branch, tag or commit on the hub."""
    attn_implementation: Literal[
        "auto", "eager", "sdpa", "flash_attention_2", "flex_attention", "blockwise", "varlen"
    ] = "auto"
    """Attention implementation; ``auto`` takes the fastest one that device and model support. ``blockwise`` is our own
    for CPUs. ``varlen`` is torch's varlen attention on a GPU and our own on a CPU; like ``flash_attention_2``, it runs
    each micro-batch as one row without padding."""
    trust_remote_code: Annotated[bool, MAY_CHANGE, RUNS_CODE] = False
    """Run the Python code shipped with the model. Read that code before you turn this on."""
    check: Annotated[Literal["auto", "always", "off"], MAY_CHANGE] = "auto"
    """Compare a small twin of the model with upstream's own code before the first step. ``auto`` reuses a cached
    result, ``always`` compares again, ``off`` trains unchecked."""
    add_tokens: Annotated[list[str], YOUNGER] = field(default_factory=list)
    """Special tokens to add to the tokenizer, such as an end of turn or chat markers that a base model lacks. Their
    rows of embedding and head are trained and saved with the adapter; all other rows stay frozen."""
    config_overrides: dict[str, Any] = field(default_factory=dict)
    """Values that override the model's config.json (``rope_theta``, ``rope_scaling``, ...). Keys that the model's
    config lacks are rejected."""


@dataclass(frozen=True)
class DataSettings:
    """Training and evaluation data."""

    train: Annotated[Any, VERBATIM] = None
    """Training data: file, URL, folder, glob, hub data set, or a list of these. Files are JSONL, JSON, CSV, Parquet,
    Arrow or text, also compressed (.gz, .zst, .bz2, .xz). Hub data sets are ``owner/name`` or
    ``owner/name/configuration``. A ``:split`` suffix on a folder or data set selects a split other than ``train``."""
    eval: Annotated[Any, VERBATIM] = None
    """Evaluation data, given like ``train``; ``null`` holds out ``eval_fraction`` of the training rows instead."""
    eval_fraction: Annotated[float | Auto, BELOW_ONE] = "auto"
    """Share of the prompts held out for evaluation when ``eval`` is null; equal prompts stay together. ``auto``: about
    5 % of the rows, 4 to 200 of them, without near-copies of a training row; none of fewer than 20 rows."""
    format: Literal["auto", "messages", "conversations", "alpaca", "prompt_completion", "preference", "text"] = "auto"
    """Row format; ``auto`` infers it from each row's columns. ``preference`` rows train on the chosen answer."""
    columns: dict[str, str] = field(default_factory=dict)
    """Maps the format's column names to those in the files (``{messages: dialogue}``)."""
    row_function: str | None = None
    """``module:function`` that converts a row (a dict) to one of the known formats; needs ``allow_code``."""
    allow_code: Annotated[bool, RUNS_CODE] = False
    """Allow ``row_function`` to be imported and run."""
    ignore_keys: list[str] = field(default_factory=list)
    """Message keys to drop. Every other key meant for the model must be written by its chat template."""
    template: Annotated[str | None, VERBATIM] = None
    """File with a chat template (Jinja) that replaces the tokenizer's."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Tokens that the loss covers: every answer, the last answer of each row, or all tokens."""
    on_bad_row: Literal["error", "skip"] = "error"
    """On an unreadable row, stop and name file and line, or skip it and list it in the run folder."""
    weights: list[float] | None = None
    """Share of each ``train`` source in an epoch. The epoch keeps its number of sequences; rows repeat as needed."""
    temperature: Annotated[float, NOT_NEGATIVE] = 0.0
    """Instead of ``weights``: shares proportional to (sequences of the source) ** (1 / temperature); 0 = off."""
    counts: list[int] | None = None
    """Instead of ``weights``: number of sequences that each source contributes to an epoch."""
    show_samples: Annotated[int, NOT_NEGATIVE] = 3
    """Sequences printed before training, with learned tokens marked; the run folder holds them in full."""
    report: bool = False
    """`prepare`: print a report on the data: rows, tokens, lengths, truncation, packing, steps."""
    max_length: Annotated[int, POSITIVE] = 2048
    """Maximum row length in tokens."""
    truncation: Literal["right", "left", "drop", "split"] = "right"
    """Treatment of longer rows: cut at the right or left, drop, or split into several rows."""
    packing: bool = False
    """Pack several rows into each sequence of ``max_length`` tokens. Batch sizes then count sequences. A probe checks
    that rows in a sequence cannot attend to each other; if they can, the run stops."""
    padding_free: bool = False
    """Concatenate the rows of a micro-batch instead of padding them. Guarded by the same probe as ``packing``."""
    length_grouped: bool = False
    """Batch rows of similar length: less padding, slightly less random order. Rows are grouped within windows of 50
    shuffled batches."""
    streaming: bool = False
    """Read training rows during training, for data that does not fit on disk. Needs ``train.max_steps`` and, to
    evaluate, ``data.eval``. Every rank reads all rows."""
    shuffle_window: Annotated[int, POSITIVE] = 10000
    """Rows per shuffle window when streaming; a window is held in memory."""
    max_rows: int | None = None
    """Use only this many rows from the start of the training data, before the evaluation split."""


@dataclass(frozen=True)
class QuantSettings:
    """Storage format of the frozen base model."""

    name: QuantName = "nf4"
    """``nf4`` (4-bit NormalFloat), ``fp4`` (4-bit float), ``int8`` (LLM.int8), or ``none`` (plain LoRA, no
    quantization)."""
    double_quant: Annotated[bool, FormatOption("double_quant")] = True
    """Also quantize the block statistics (QLoRA's double quantization; 4-bit only)."""
    block_size: Annotated[int, FormatOption("block_size")] = 64
    """Weights that share one statistic: 64, 128, 256, 512, 1024, 2048 or 4096 (4-bit only)."""
    llm_int8_threshold: Annotated[float, NOT_NEGATIVE, FormatOption("threshold")] = 6.0
    """Outlier threshold of LLM.int8 (int8 only); 0 = no outliers. Input columns with a value of at least this magnitude
    are multiplied without being quantized."""
    overrides: dict[str, str] = field(default_factory=dict)
    """Maps patterns of linear names in the decoder layers to other formats; ``none`` keeps 16 bits. A pattern matches
    the whole name, and later patterns win: ``{*.down_proj: int8, model.layers.0.*: none}``."""
    embeddings: QuantName = "none"
    """Format of embeddings and head. Embedding rows are dequantized on lookup, the head slice by slice."""
    vision: Annotated[QuantName, YOUNGER] = "none"
    """Format of the linears that only images pass through, if the model reads images: those of its vision tower and its
    projector. Patterns of ``overrides`` may name them then, too."""
    cache_dequantized: Annotated[Switch, MAY_CHANGE] = "auto"
    """Keep dequantized weights from forward to backward instead of dequantizing twice; ``auto`` = if they fit, but on a
    CPU only where they are kept from step to step: on one rank, or with one copy per rank. Takes as much memory as the
    model in 16 bits; not with ``fsdp.offload=activations``."""
    allow_16bit: bool = False
    """Continue if more than 10 % of the weights of layers and linears cannot be quantized and stay in 16 bits."""


@dataclass(frozen=True)
class FsdpSettings:
    """Sharding of the parameters over the ranks."""

    shard_degree: Annotated[int | Literal["auto"], NOT_NEGATIVE] = 0
    """Ranks that share one copy of the parameters; 0 = all ranks divided by ``replicate_degree``. ``auto`` takes one
    rank, those of a node, or all: whichever fits and is fastest. With 1, every rank keeps the model whole."""
    replicate_degree: Annotated[int, POSITIVE] = 1
    """Number of sharded copies of the parameters (hybrid sharding)."""
    reshard_after_forward: Switch = "auto"
    """Free gathered parameters between forward and backward; ``auto`` keeps them if they fit. ``false`` gathers each
    layer once per step and holds all of them."""
    offload: Literal["none", "params", "activations", "all"] = "none"
    """Keep parameters, activations or both in host memory. ``params`` includes gradients and optimizer states;
    ``activations`` are the tensors of 1 MiB and more that decoder layers save for backward. Host memory is pinned on an
    accelerator; on a CPU there is nothing to gain."""
    offload_modules: list[str] = field(default_factory=list)
    """Keep unquantized weights of these modules in host memory: ``head``, ``embeddings``, ``norms`` or name patterns.
    They are stored sharded in float32 and copied to the device when needed. A pattern is like ``model.layers.0.*``.
    Unlike ``offload=params``, trained parameters stay on the device. Losses do not change."""
    prefetch: Annotated[int, NOT_NEGATIVE] = 1
    """Decoder layers gathered, or copied from host memory, ahead of the current one; 0 = none in backward, to hold one
    layer fewer."""
    adapters: Literal["sharded", "replicated"] = "sharded"
    """Shard the adapters, or replicate them on every rank: fewer and smaller messages, more memory. ``replicated``
    holds adapters, gradients and optimizer states whole. No layer gathers adapters then, and one reduction per step
    covers all their gradients."""

    @property
    def offloads_parameters(self) -> bool:
        """Whether parameters stay in host memory."""
        return self.offload in ("params", "all")

    @property
    def offloads_activations(self) -> bool:
        """Whether activations saved for backward stay in host memory."""
        return self.offload in ("activations", "all")


@dataclass(frozen=True)
class PrecisionSettings:
    """The one precision setting, which determines storage, compute, norm and adapter dtypes."""

    name: Literal["bf16", "fp32"] = "bf16"
    """``bf16``: compute in bfloat16, adapters and reductions in float32. ``fp32``: everything in float32."""


@dataclass(frozen=True)
class CheckpointSettings:
    """Checkpoints and resuming."""

    every_steps: Annotated[int, NOT_NEGATIVE] = 0
    """Steps between checkpoints; 0 = only at the end and when a signal stops the run."""
    keep_last: Annotated[int, POSITIVE] = 2
    """Number of newest complete checkpoints to keep."""
    keep_every: Annotated[int, NOT_NEGATIVE] = 0
    """Also keep checkpoints whose step is a multiple of this; 0 = off."""
    keep_best: Annotated[int, NOT_NEGATIVE] = 0
    """Also keep this many checkpoints with the lowest held-out loss. Only those evaluated at their own step count."""
    asynchronous: bool = True
    """Write checkpoints in the background while training continues."""
    fallback_dir: Annotated[str | None, VERBATIM] = None
    """Folder for a last save if the run folder becomes unwritable (``<fallback_dir>/<run.name>``)."""
    resume: Annotated[str, VERBATIM] = "auto"
    """``auto`` (resume from the newest complete checkpoint), ``never`` (start afresh), or a checkpoint folder."""
    resume_overrides: list[str] = field(default_factory=list)
    """Settings that may differ from the checkpoint's (``[optim.lr,schedule]``); the new values apply."""


@dataclass(frozen=True)
class LauncherSettings:
    """Launching the ranks and their communication."""

    nproc_per_node: Annotated[int, NOT_NEGATIVE] = 0
    """Ranks that `fsdp-qlora train` starts itself; 0 = one per accelerator (1 on a CPU)."""
    timeout_seconds: Annotated[int, POSITIVE] = 600
    """Timeout of a collective, in seconds; a longer wait ends the run."""
    max_restarts: Annotated[int, NOT_NEGATIVE] = 0
    """Maximum number of restarts of all ranks, from the last checkpoint, after a rank fails."""
    shutdown_seconds: Annotated[int, NOT_NEGATIVE] = 120
    """Seconds that the ranks get to save and exit after a signal."""
    threads_per_rank: Annotated[int, NOT_NEGATIVE] = 0
    """CPU threads per rank; 0 = cores / ranks on this node."""
    device: Literal["auto", "cpu", "cuda", "xpu"] = "auto"
    """Device type; ``auto`` takes cuda, then xpu, then cpu."""
    keep_freed_memory: bool = True
    """Let CPU ranks keep freed memory between steps, which is faster; ``false`` returns blocks of 16 MiB and more."""


@dataclass(frozen=True)
class DebugSettings:
    """Debugging and profiling modes."""

    name: Literal["off", "anomaly", "plain", "profile"] = "off"
    """``anomaly`` (find the source of a NaN), ``plain`` (no optimizations) or ``profile`` (record some steps).
    ``anomaly`` runs autograd's anomaly detection (slow), which names the operation that produced the NaN. ``plain``
    turns off fused products, blockwise attention, compiled layers and whatever ``auto`` keeps in memory for speed; the
    results agree within rounding. It is refused beside a setting that asks for one of them. ``profile`` records some
    steps with torch's profiler and reports where their time went and what share of it the matrix products need."""
    warmup_steps: Annotated[int, NOT_NEGATIVE] = 2
    """``profile``: steps to skip after this start before recording."""
    record_steps: Annotated[int, POSITIVE] = 3
    """``profile``: steps to record."""


@dataclass(frozen=True)
class RunConfig(Saved):
    """All settings of a run, checked by `fsdp_qlora.config.rules.check`."""

    run: RunSettings = field(default_factory=RunSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    quant: QuantSettings = field(default_factory=QuantSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    fsdp: FsdpSettings = field(default_factory=FsdpSettings)
    precision: PrecisionSettings = field(default_factory=PrecisionSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    track: TrackSettings = field(default_factory=TrackSettings)
    launcher: LauncherSettings = field(default_factory=LauncherSettings)
    debug: DebugSettings = field(default_factory=DebugSettings)
    sweep: SweepSettings = field(default_factory=SweepSettings)
    plan: PlanSettings = field(default_factory=PlanSettings)
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
    generate: GenerateSettings = field(default_factory=GenerateSettings)
    export: ExportSettings = field(default_factory=ExportSettings)
    prompt: Annotated[str | None, VERBATIM] = None
    """`generate`: the prompt, taken as typed."""
    prompt_file: Annotated[str | None, VERBATIM] = None
    """`generate`: file with the prompt."""
    adapter: Annotated[str | dict[str, str] | None, VERBATIM] = None
    """`generate`, `evaluate`: PEFT adapter folder; null = the base model alone. `generate` also takes several by name
    (``{poet: FOLDER, coder: FOLDER}``) and answers with each, or with ``generate.adapter``. `export`: the adapter to
    fold in (``what=merged``), to serve (``what=served``) or to convert (``export.plain_lora``), null = that of the
    run's newest checkpoint; or, if it started from the base weights, the one whose base to write
    (``what=base-4bit``)."""
    what: Annotated[str, choices.EXPORTS] = "adapter"
    """`export`: a checkpoint's adapter, the base model in bitsandbytes' 4-bit format (``base-4bit``; loads without
    being quantized again), the same with the adapter beside it (``served``), the base model in 16 bits with the adapter
    folded in (``merged``), that for llama.cpp and Ollama (``gguf``), or the adapter alone for them
    (``gguf-adapter``)."""
    run_from: Annotated[str | None, VERBATIM] = None
    """Start from the settings of an earlier run: its config.yaml or its folder."""


def from_dict(values: Mapping[str, Any]) -> RunConfig:
    """Build a `RunConfig` from nested dictionaries; missing keys take their defaults.

    Raises:
        ConfigError: naming all unknown keys and all values of the wrong type.
    """
    return build(RunConfig, values)
