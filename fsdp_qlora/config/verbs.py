"""Settings of single verbs, and of sweeps, which are part of `schema.RunConfig`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from fsdp_qlora.config.facts import NOT_NEGATIVE, POSITIVE, RUNS_CODE, SHARE, VERBATIM


@dataclass(frozen=True)
class SweepSettings:
    """Sweeps: `train --multirun`."""

    trials: Annotated[int, NOT_NEGATIVE] = 0
    """Search with so many trainings instead of every combination: Optuna chooses the values; needs the extra
    ``optuna``. Ranges are then possible, too: ``optim.lr=tag(log,interval(1e-5,1e-3))``."""
    metric: str = "eval_loss_after"
    """What to compare: a number of summary.json."""
    maximize: bool = False
    """Whether larger is better."""
    prune: bool = False
    """Stop a training of a search whose held-out loss is above the median of the others at the same step."""


@dataclass(frozen=True)
class PlanSettings:
    """The `plan` verb."""

    json: bool = False
    """Print JSON instead of a table."""
    world_size: Annotated[int, NOT_NEGATIVE] = 0
    """Number of ranks to plan for; 0 = as many as `train` would start."""
    gpu: str | None = None
    """Memory of one device (``24GiB``), to check whether the plan fits."""
    device: str | None = None
    """Device name (``rtx4090``, ``h100``), for its memory and the time of a step. ``gpu`` overrides the memory; an
    unknown name lists all known ones."""
    interconnect: str | None = None
    """Interconnect name (``pcie4_no_p2p``, ``nvlink4``) or rate (``12GB/s``); null = the device's usual one. An unknown
    name lists all known ones."""
    images_per_row: Annotated[int, NOT_NEGATIVE] = 0
    """Images in a row, each as large as the model's processor leaves them, if the model reads images; 0 = as many as
    ``data.max_length`` has room for. `train` counts those of its rows."""
    simulate: bool = False
    """Also run one step of the real code on fake tensors and count what it would allocate."""
    search: bool = False
    """Find the largest micro-batch and sequence, and the cheapest checkpointing and offload, that fit."""


@dataclass(frozen=True)
class EvaluateSettings:
    """The `evaluate` verb."""

    json: Annotated[str | None, VERBATIM] = None
    """JSON file to write ``{eval_loss, eval_perplexity, target_tokens}`` to, with the same for each source, and with
    what else was measured."""
    tasks: list[str] = field(default_factory=list)
    """Tasks of lm-evaluation-harness to run (``[arc_easy, hellaswag]``); needs the extra ``eval``."""
    task_path: Annotated[str | None, VERBATIM, RUNS_CODE] = None
    """Folder with tasks of your own, as YAML files of lm-evaluation-harness. Such a file may name Python functions in
    the folder, which are then run."""
    limit: Annotated[int, NOT_NEGATIVE] = 0
    """Documents of each task to use, from the start; 0 = all of them."""
    num_fewshot: Annotated[int | None, NOT_NEGATIVE] = None
    """Examples in a task's prompt; null = what each task says."""
    chat_template: bool = False
    """Ask tasks through the model's chat template."""
    prompts: Annotated[str | None, VERBATIM] = None
    """JSONL file of prompts to answer, as in ``generate.prompts``, with the settings of ``generate``."""
    compare: bool = False
    """Also measure the base without the adapter, and print both side by side."""


@dataclass(frozen=True)
class GenerateSettings:
    """The `generate` verb."""

    max_new_tokens: Annotated[int, POSITIVE] = 256
    """Maximum length of the answer in tokens."""
    temperature: Annotated[float, NOT_NEGATIVE] = 0.0
    """Sampling temperature; 0 = greedy, the same answer every time."""
    top_p: Annotated[float, SHARE] = 1.0
    """Probability mass for nucleus sampling, when the temperature is above 0."""
    top_k: Annotated[int, NOT_NEGATIVE] = 0
    """Sample from this many of the likeliest tokens, when the temperature is above 0; 0 = all of them."""
    seed: Annotated[int | None, NOT_NEGATIVE] = None
    """Seed for sampling; null = ``run.seed``."""
    stop: list[str] = field(default_factory=list)
    """Texts that end an answer, in addition to the model's own end of turn; the answer does not hold them."""
    adapter: str | None = None
    """Which of several adapters (``adapter={name: FOLDER}``) answers, or ``__base__`` for none; null = each of them.
    With ``prompts``, a row may name another one as its ``adapter``."""
    chat: bool = False
    """Talk with the model: reads standard input line by line, keeps the conversation, and prints each answer as it
    comes. ``/reset`` forgets the conversation, ``/adapter NAME`` switches among several adapters, ``/quit`` ends it."""
    prompts: Annotated[str | None, VERBATIM] = None
    """JSONL file of prompts to answer in batches, instead of one prompt: ``{"prompt": "..."}`` or
    ``{"messages": [...]}``; what else a line holds is kept."""
    to: Annotated[str | None, VERBATIM] = None
    """JSONL file for the answers. A run that was killed goes on where it stopped."""
    batch_size: Annotated[int, POSITIVE] = 8
    """Prompts that a rank answers at once, with ``prompts``."""
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = None
    """Load with plain transformers instead, in one process that puts the layers on all devices, then in host memory,
    then on disk, in the way of this name (``auto`` = ``balanced``); null = sharded over the ranks."""
    max_memory: dict[str, str] = field(default_factory=dict)
    """``device_map``: most memory for weights on each device, ``{0: 20GiB, 1: 20GiB, cpu: 60GiB}``; one that is left
    out gets none. Empty = what is free on each."""
    offload_fp32: bool = False
    """``device_map``: keep layers that a quantized model leaves in host memory or on disk unquantized, as bitsandbytes
    requires; otherwise it is an error if the devices cannot hold all of them."""
    offload_folder: Annotated[str | None, VERBATIM] = None
    """``device_map``: folder for weights on disk that are not in the model's files as they are (converted experts);
    the others are read from those."""


@dataclass(frozen=True)
class ExportSettings:
    """The `export` verb."""

    checkpoint: Annotated[str | None, VERBATIM] = None
    """Checkpoint folder to export; null = the run's newest complete checkpoint."""
    plain_lora: bool = False
    """Convert an adapter that started from the base weights (PiSSA, OLoRA, LoftQ) to a plain LoRA of twice the rank for
    the original base, and print what that changes."""
    to: Annotated[str | None, VERBATIM] = None
    """Output folder; null = ``<run folder>/adapter`` for an adapter."""
    overwrite: bool = False
    """Replace an earlier export of the same kind in ``to``, as a whole; with ``push``, also what the repository holds.
    """
    push: str | None = None
    """Also upload the export to this repository of the Hugging Face hub (``OWNER/NAME``), with a model card. A new one
    is private. The token is that of ``hf auth login``."""
    compare: bool = False
    """Print the held-out loss of the trained model and of both merges (``merged``) or of the adapter on the original
    base in 16 bits (``adapter``), and how far their logits are from the trained model's."""
    for_vllm: bool = False
    """``adapter``: write a LoRA of one rank and scaling 1, which computes the same and which vLLM reads right."""
    weights: dict[str, float] = field(default_factory=dict)
    """``adapter``: with which weights several adapters of LoRA's kinds (``adapter={name: FOLDER}``) become one:
    ``{poet: 0.7, coder: 0.3}``."""
    combination: Literal["svd", "cat", "linear"] = "svd"
    """How: ``cat`` is exact and adds up the ranks, ``svd`` is the best approximation of rank ``rank``, ``linear`` adds
    the matrices themselves, of equal ranks, which is not the sum of what they compute. As in PEFT."""
    rank: Annotated[int, NOT_NEGATIVE] = 0
    """``svd``: the rank of the result; 0 = the largest of the adapters'."""
    merge_base: Literal["auto", "original", "dequantized"] = "auto"
    """``merged``: fold the adapter into the weights as they are stored (``original``), or as they are after quantizing,
    which is what it was trained on (``dequantized``). ``auto`` measures both on at most 64 held-out rows and keeps the
    better one; without such rows, ``dequantized``."""
    gguf_type: str = "f16"
    """``gguf``: type of the weights in the file; ``gguf-adapter``: of the base model's, if that is converted.
    llama.cpp's converter writes f32, f16, bf16, q8_0, tq1_0 and tq2_0; its quantizer makes others of such a file."""
    gguf_base: Annotated[str | None, VERBATIM] = None
    """``gguf-adapter``: the base model in GGUF: a file, or Ollama's name of it (``qwen3:8b``); null = convert it."""
    llama_cpp: Annotated[str | None, VERBATIM, RUNS_CODE] = None
    """``gguf``, ``gguf-adapter``: a checkout of llama.cpp whose converters to run; null = the ones in the source
    archive of llama-cpp-python, which is fetched once and verified."""
