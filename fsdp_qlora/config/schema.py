"""`RunConfig` and its groups: every setting of a run, its type, its default and what it means.

Frozen dataclasses of plain values; nothing here imports torch, hydra or omegaconf. Each group is one folder of
``conf/``; those of single verbs are in `fsdp_qlora.config.verbs`. The string under a field is its documentation, and
`fsdp-qlora VERB --help` shows the composed values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from fsdp_qlora.config import choices
from fsdp_qlora.config.convert import build
from fsdp_qlora.config.facts import BELOW_ONE, MAY_CHANGE, NOT_NEGATIVE, POSITIVE, VERBATIM
from fsdp_qlora.config.optim import OptimSettings, ScheduleSettings
from fsdp_qlora.config.saved import Saved
from fsdp_qlora.config.verbs import EvaluateSettings, ExportSettings, GenerateSettings, PlanSettings

Switch = Literal["auto", "true", "false"]
"""``auto``: the plan decides, and says so."""
QuantName = Annotated[str, choices.FORMATS, choices.NONE]
BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
"""Numbers of weights that may share one statistic: bitsandbytes' own, from 64 on (of 32 a nested block parts a row)."""
Checkpointing = Literal["auto", "none", "selective", "full"]


@dataclass(frozen=True)
class RunSettings:
    """Which run this is and where it lives."""

    name: Annotated[str, VERBATIM] = "run"
    """Name of the run; its folder is ``<output_root>/<name>``."""
    output_root: Annotated[str, VERBATIM] = "outputs"
    """Folder that holds all runs."""
    seed: Annotated[int, NOT_NEGATIVE] = 0
    """Seed of the data order, the adapters' initialisation and dropout."""


@dataclass(frozen=True)
class ModelSettings:
    """The base model."""

    name: Annotated[str, VERBATIM, MAY_CHANGE] = ""
    """Hub name (``Qwen/Qwen3-8B``) or a folder with config.json and safetensors."""
    revision: Annotated[str | None, MAY_CHANGE] = None
    """Branch, tag or commit on the hub."""
    attn_implementation: Literal[
        "auto", "eager", "sdpa", "flash_attention_2", "flex_attention", "blockwise", "varlen"
    ] = "auto"
    """Attention. ``blockwise`` is ours for CPUs. ``varlen`` is torch's varlen attention on a GPU and our own on a CPU;
    like ``flash_attention_2`` it takes micro-batches as one row without padding. ``auto`` takes the fastest that the
    device and the model allow."""
    trust_remote_code: Annotated[bool, MAY_CHANGE] = False
    """Run Python code that comes with the model. Off unless you have read that code."""
    check: Annotated[Literal["auto", "always", "off"], MAY_CHANGE] = "auto"
    """Before the first step, compare a small twin of the model with upstream's own code; ``auto`` takes a remembered
    result, ``always`` compares anew, ``off`` trains unchecked."""
    config_overrides: dict[str, Any] = field(default_factory=dict)
    """Values that replace those of the model's config.json (``rope_theta``, ``rope_scaling`` and the like); a key that
    the model's config does not have is refused."""


@dataclass(frozen=True)
class DataSettings:
    """What is learned from."""

    train: Annotated[Any, VERBATIM] = None
    """File (JSONL, JSON, CSV, Parquet, Arrow, text; also .gz, .zst, .bz2, .xz; also a URL), folder, glob, hub data set
    (``owner/name`` or ``owner/name/configuration``), or a list of them. ``:split`` behind a folder or a data set takes
    another split than ``train``."""
    eval: Annotated[Any, VERBATIM] = None
    """The same, for evaluation; ``null`` takes ``eval_fraction`` of the training rows instead."""
    eval_fraction: Annotated[float, BELOW_ONE] = 0.0
    """Share of the prompts held out for evaluation when ``eval`` is null; equal prompts stay on one side."""
    format: Literal["auto", "messages", "conversations", "alpaca", "prompt_completion", "preference", "text"] = "auto"
    """Shape of a row; ``auto`` goes by each row's columns. Of ``preference`` the chosen answer is learned."""
    columns: dict[str, str] = field(default_factory=dict)
    """The format's name of a column -> the name it has in the files (``{messages: dialogue}``)."""
    row_function: str | None = None
    """``module:function`` that turns a row (a dict) into one of the known formats; needs ``allow_code``."""
    allow_code: bool = False
    """Import and run ``row_function``."""
    ignore_keys: list[str] = field(default_factory=list)
    """Keys of messages to leave out. Others that are for the model must be written by its chat template."""
    template: Annotated[str | None, VERBATIM] = None
    """File with a chat template (jinja) to use instead of the tokenizer's."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """What is learned: every answer, the last answer of each row, or every token."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A row that cannot be read: stop and name file and line, or pass over it and list it in the run folder."""
    weights: list[float] | None = None
    """Share of each source of ``train`` in an epoch of as many sequences as there are; rows repeat as needed."""
    temperature: Annotated[float, NOT_NEGATIVE] = 0.0
    """Instead of ``weights``: shares are (sequences of the source) ** (1 / temperature); 0 = as they are."""
    counts: list[int] | None = None
    """Instead of ``weights``: how many sequences of each source make an epoch."""
    show_samples: Annotated[int, NOT_NEGATIVE] = 3
    """Sequences printed before training with what is learned marked; all of each goes to the run folder."""
    report: bool = False
    """`prepare`: print what is in the data: rows, tokens, lengths, what was cut, packing, steps."""
    max_length: Annotated[int, POSITIVE] = 2048
    """Longest row in tokens."""
    truncation: Literal["right", "left", "drop", "split"] = "right"
    """What happens to a longer row: cut at an end, dropped, or split into several rows."""
    packing: bool = False
    """Several rows in one sequence of ``max_length`` tokens; refused where a probe shows that they would see each
    other. Batch sizes then count sequences."""
    padding_free: bool = False
    """A micro-batch's rows end to end in one sequence instead of padded to the longest; the same probe guards it."""
    length_grouped: bool = False
    """Batches of rows of like length (within windows of 50 shuffled batches): less padding, a little less random."""
    streaming: bool = False
    """Read the training rows while training, for what does not fit the disk. Needs ``train.max_steps`` and, to
    evaluate, ``data.eval``; every rank reads them all."""
    shuffle_window: Annotated[int, POSITIVE] = 10000
    """Rows that are shuffled together when streaming; all of them are in memory."""
    max_rows: int | None = None
    """Use only the first rows of the training data (before the split)."""


@dataclass(frozen=True)
class QuantSettings:
    """How the frozen base is stored."""

    name: QuantName = "nf4"
    """4-bit NormalFloat, 4-bit float, ``int8`` (LLM.int8), or ``none`` (bf16 base, plain LoRA)."""
    double_quant: bool = True
    """Quantize the block statistics too (QLoRA's double quantization; 4-bit only)."""
    block_size: int = 64
    """Weights that share one statistic (4-bit only): 64, 128, 256, 512, 1024, 2048 or 4096."""
    llm_int8_threshold: Annotated[float, NOT_NEGATIVE] = 6.0
    """int8 only: columns of the input that hold a value of at least this magnitude are multiplied without quantizing
    them (LLM.int8's outliers). 0 quantizes all."""
    overrides: dict[str, str] = field(default_factory=dict)
    """Pattern of module names -> format, for some linears of the decoder layers; ``none`` leaves them in 16 bit. A
    pattern matches the whole name, a later one wins: ``{*.down_proj: int8, model.layers.0.*: none}``."""
    embeddings: QuantName = "none"
    """Quantize embedding and head too: rows are dequantized as they are looked up, the head slice by slice."""
    cache_dequantized: Annotated[Switch, MAY_CHANGE] = "auto"
    """Keep each dense weight from forward to backward instead of dequantizing it twice: as much memory as the model has
    in 16 bit. ``auto``: where that fits."""
    allow_16bit: bool = False
    """Go on where more than 10 % of the decoder layers' weights cannot be quantized and stay in 16 bit."""


@dataclass(frozen=True)
class LoraSettings:
    """The trainable adapters."""

    variant: Annotated[str, choices.METHODS] = "lora"
    """Scaling: alpha/r (``lora``) or alpha/sqrt(r) (``rslora``)."""
    r: Annotated[int, POSITIVE] = 16
    """Rank of the adapters."""
    alpha: Annotated[float, POSITIVE] = 32.0
    """Numerator of the scaling."""
    dropout: Annotated[float, BELOW_ONE] = 0.0
    """Dropout before A; its masks depend on (seed, step, micro-batch), never on the rank."""
    target_modules: Any = "all-linear"
    """``all-linear`` or a list of module names or name endings (``[q_proj, v_proj]``)."""
    init_from: Annotated[str | None, VERBATIM, MAY_CHANGE] = None
    """Folder of a PEFT adapter that a new run starts from (same ``r``, ``alpha`` and targets)."""


@dataclass(frozen=True)
class FsdpSettings:
    """How the parameters are spread over the ranks."""

    shard_degree: Annotated[int, NOT_NEGATIVE] = 0
    """Ranks that share one copy of the parameters; 0 = all ranks divided by ``replicate_degree``."""
    replicate_degree: Annotated[int, POSITIVE] = 1
    """Number of such copies (hybrid sharding)."""
    reshard_after_forward: Switch = "auto"
    """Free a layer's gathered parameters between forward and backward. ``false`` gathers each layer once a step and
    holds all of them; ``auto`` does so where that fits."""
    offload: Literal["none", "params", "activations", "all"] = "none"
    """What is kept in host memory: parameters with their gradients and optimizer states, what the decoder layers keep
    for backward, or both. Pinned on an accelerator; on a CPU there is nothing to gain."""
    offload_modules: list[str] = field(default_factory=list)
    """Modules whose unquantized weights are kept in host memory, in float32 and sharded, and brought in when needed:
    ``head``, ``embeddings``, ``norms``, or patterns of names (``model.layers.0.*``). Other than with
    ``offload=params``, what is trained stays on the device. No loss changes."""
    prefetch: Annotated[int, NOT_NEGATIVE] = 1
    """Decoder layers that are gathered ahead of the one that computes; 0 = none in backward, to hold one less."""
    adapters: Literal["sharded", "replicated"] = "sharded"
    """``replicated``: every rank holds the adapters, their gradients and optimizer states whole. They are then gathered
    with no layer, and their gradients are reduced once a step, all as one: fewer and smaller messages, more memory."""

    @property
    def offloads_parameters(self) -> bool:
        """Whether parameters are kept in host memory."""
        return self.offload in ("params", "all")

    @property
    def offloads_activations(self) -> bool:
        """Whether what layers keep for backward is kept in host memory."""
        return self.offload in ("activations", "all")


@dataclass(frozen=True)
class PrecisionSettings:
    """The one precision setting: storage, compute, norm and adapter dtypes all follow from it."""

    name: Literal["bf16", "fp32"] = "bf16"
    """``bf16``: compute in bfloat16, adapters and reductions in float32. ``fp32``: everything in float32."""


@dataclass(frozen=True)
class TrainSettings:
    """The loop."""

    max_steps: Annotated[int, NOT_NEGATIVE, MAY_CHANGE] = 0
    """Optimizer steps; 0 = as many as ``num_epochs`` takes."""
    num_epochs: Annotated[float, NOT_NEGATIVE, MAY_CHANGE] = 1.0
    """Passes over the training rows, when ``max_steps`` is 0."""
    global_batch_size: Annotated[int, POSITIVE] = 16
    """Rows per optimizer step, over all ranks."""
    micro_batch_size: Annotated[int, POSITIVE] = 1
    """Rows per forward and backward of one rank."""
    eval_every: Annotated[int, NOT_NEGATIVE, MAY_CHANGE] = 0
    """Steps between evaluations; 0 = only before the first and after the last step."""
    micro_batch_tokens: Annotated[int, NOT_NEGATIVE] = 0
    """Instead of ``micro_batch_size``: as many rows as fit into that many tokens, padding included (a longer row goes
    alone); 0 = not used."""
    eval_batch_size: Annotated[int, POSITIVE, MAY_CHANGE] = 8
    """Rows per forward in evaluation."""
    log_every: Annotated[int, NOT_NEGATIVE, MAY_CHANGE] = 1
    """Steps between lines of metrics.jsonl and of the progress display; 0 = never."""
    max_grad_norm: Annotated[float, NOT_NEGATIVE] = 1.0
    """Gradients are scaled down to this global norm; 0 = never."""
    early_stopping_patience: Annotated[int, NOT_NEGATIVE, MAY_CHANGE] = 0
    """Stop after this many evaluations without a better loss; 0 = never."""
    on_nonfinite: Annotated[Literal["stop", "skip", "rollback"], MAY_CHANGE] = "stop"
    """A loss or gradient that is no finite number, or a spike: stop, leave this batch out, or go back to the last
    checkpoint and leave out the batches since then. The update is never made; what went wrong is named."""
    spike_factor: Annotated[float, NOT_NEGATIVE, MAY_CHANGE] = 0.0
    """A loss above this many times the mean of the last 16 counts as a spike; 0 = never."""
    max_bad_steps: Annotated[int, POSITIVE, MAY_CHANGE] = 5
    """Bad steps in a row after which ``skip`` and ``rollback`` stop, too."""
    activation_checkpointing: Annotated[Checkpointing, MAY_CHANGE] = "auto"
    """Recompute decoder layers in backward: ``none``; ``selective`` all but their matrix products and attention, whose
    results are kept; ``full`` all. ``auto`` takes the first of these that fits."""
    compile: Annotated[Switch, MAY_CHANGE] = "auto"
    """torch.compile the decoder layers. ``auto`` does so where the run is long enough to win back the compilation."""
    logits_chunk: Annotated[int, POSITIVE, MAY_CHANGE] = 256
    """Supervised tokens whose logits exist at the same time."""
    sample_prompts: Annotated[list[str], MAY_CHANGE] = field(default_factory=list)
    """Prompts answered before and after training, shown in the summary."""
    sample_at_eval: Annotated[bool, MAY_CHANGE] = False
    """Also answer them at every evaluation; the answers go to ``answers.jsonl``."""
    sample_tokens: Annotated[int, POSITIVE, MAY_CHANGE] = 48
    """Longest such answer, in tokens."""


@dataclass(frozen=True)
class ObjectiveSettings:
    """What the loss is."""

    name: Annotated[str, choices.OBJECTIVES] = "sft"
    """Cross entropy on the supervised tokens: their sum over the global count."""


@dataclass(frozen=True)
class CheckpointSettings:
    """What is kept of a run so that it can go on."""

    every_steps: Annotated[int, NOT_NEGATIVE] = 0
    """Steps between checkpoints; 0 = only when stopped by a signal and at the end."""
    keep_last: Annotated[int, POSITIVE] = 2
    """Newest complete checkpoints that are kept."""
    keep_every: Annotated[int, NOT_NEGATIVE] = 0
    """Also keep those whose step is a multiple of this; 0 = none for that."""
    keep_best: Annotated[int, NOT_NEGATIVE] = 0
    """Also keep that many with the lowest held-out loss (of those evaluated at their own step)."""
    asynchronous: bool = True
    """Write in the background while training goes on."""
    fallback_dir: Annotated[str | None, VERBATIM] = None
    """Folder for one last save where the run folder cannot be written any more (``<fallback_dir>/<run.name>``)."""
    resume: Annotated[str, VERBATIM] = "auto"
    """``auto``: from the newest complete checkpoint, ``never``: anew, or a checkpoint's folder."""
    resume_overrides: list[str] = field(default_factory=list)
    """Settings that may differ from the checkpoint's (``[optim.lr,schedule]``): the run goes on with the new ones."""


@dataclass(frozen=True)
class TrackSettings:
    """Where metrics go besides metrics.jsonl."""

    name: Annotated[str, choices.TRACKERS] = "console"
    """``wandb`` also sends them to Weights & Biases (offline when there is no key)."""
    wandb_project: Annotated[str, VERBATIM] = "fsdp_qlora"
    """Project in W&B."""
    wandb_entity: Annotated[str | None, VERBATIM] = None
    """User or team in W&B."""


@dataclass(frozen=True)
class LauncherSettings:
    """How the ranks are started and kept in touch."""

    nproc_per_node: Annotated[int, NOT_NEGATIVE] = 0
    """Ranks that `fsdp-qlora train` starts itself; 0 = one per accelerator (1 on a CPU)."""
    timeout_seconds: Annotated[int, POSITIVE] = 600
    """A collective that waits longer ends the run."""
    max_restarts: Annotated[int, NOT_NEGATIVE] = 0
    """Start all ranks again from the last checkpoint when one fails, at most this often."""
    shutdown_seconds: Annotated[int, NOT_NEGATIVE] = 120
    """Time the ranks have, after a signal, to save and leave."""
    threads_per_rank: Annotated[int, NOT_NEGATIVE] = 0
    """CPU threads of a rank; 0 = cores / ranks on this node."""
    device: Literal["auto", "cpu", "cuda", "xpu"] = "auto"
    """Device type; ``auto`` takes cuda, then xpu, then cpu."""
    keep_freed_memory: bool = True
    """On a CPU: ranks keep the memory that they free, which is faster; else they grow to little more than planned."""


@dataclass(frozen=True)
class DebugSettings:
    """Switches for looking closer."""

    name: Literal["off", "anomaly", "plain", "profile"] = "off"
    """``plain`` runs without fused products, blockwise attention, compiled layers, and what ``auto`` keeps in memory to
    save time: the numbers are the same within rounding. ``anomaly`` runs autograd's anomaly detection (slow): names the
    operation that made a NaN. ``profile`` records some steps with torch's profiler, and says where their time went and
    which share of it the matrix products need."""
    warmup_steps: Annotated[int, NOT_NEGATIVE] = 2
    """``profile``: steps of this start before the first that is recorded."""
    record_steps: Annotated[int, POSITIVE] = 3
    """``profile``: steps that are recorded."""


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
    plan: PlanSettings = field(default_factory=PlanSettings)
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
    generate: GenerateSettings = field(default_factory=GenerateSettings)
    export: ExportSettings = field(default_factory=ExportSettings)
    prompt: Annotated[str | None, VERBATIM] = None
    """`generate`: the prompt, taken verbatim."""
    prompt_file: Annotated[str | None, VERBATIM] = None
    """`generate`: a file that holds the prompt."""
    adapter: Annotated[str | None, VERBATIM] = None
    """`generate`, `evaluate`: folder of a PEFT adapter; null = the bare base model."""
    what: Annotated[str, choices.EXPORTS] = "adapter"
    """`export`: the adapter of a checkpoint, or the base in bitsandbytes' 4-bit form (loads without quantizing)."""
    run_from: Annotated[str | None, VERBATIM] = None
    """A config.yaml of an earlier run, or its folder; its settings are the starting point."""


def from_dict(values: Mapping[str, Any]) -> RunConfig:
    """Build a `RunConfig` from nested dictionaries; missing keys take their defaults.

    Raises:
        ConfigError: naming every unknown key and every value of the wrong type.
    """
    return build(RunConfig, values)
