"""The transformers model on the meta device, its tokenizer, its shapes, and its buffers once it is real."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import guard_torch_init_functions
from transformers.pytorch_utils import Conv1D
from transformers.utils.import_utils import is_flash_attn_2_available

from fsdp_qlora.errors import ModelError
from fsdp_qlora.model.attention import BLOCKWISE
from fsdp_qlora.model.model_config import load_config, not_buildable
from fsdp_qlora.plan.layout import LinearShape, ModelShapes
from fsdp_qlora.quant.matrices import QuantMatrices

_DOWNLOAD_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


def needs_hub(name: str) -> bool:
    """Whether a model's name is that of no folder here but of one on the hub."""
    folder = Path(name).expanduser()
    return not (folder.is_dir() or folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1)


def resolve_folder(name: str, revision: str | None = None) -> Path:
    """Return the folder of a model: itself where ``name`` is one, else its download from the hub.

    Raises:
        ModelError: if the folder is not there, or the hub does not give it.
    """
    if not name:
        raise ModelError(
            "model.name: not set. Give a hub name (model.name=Qwen/Qwen3-8B), a folder, or experiment=quickstart."
        )
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"model.name: {name} has no config.json: it is not a transformers model folder.")
        return folder.absolute()
    if not needs_hub(name):
        raise ModelError(f"model.name: there is no folder {name}.{_embedded_hint(name)}")
    return _download(name, revision)


def _embedded_hint(name: str) -> str:
    if "embedded" in Path(name).parts:
        return (
            " The embedded model and data are fetched by `fsdp-qlora prepare experiment=quickstart` (or `make train`)."
        )
    return ""


class _TerminalBar(tqdm):
    """The hub's progress bar, where somebody sees it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": None})


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=_DOWNLOAD_PATTERNS, tqdm_class=_TerminalBar)
        )
    except Exception as error:  # the hub's, or those of whichever HTTP library it stands on
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", "") else ""
        raise ModelError(
            f"model.name: {name} is no folder here and the hub did not give it{offline}: "
            f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        ) from error


def build_skeleton(
    folder: Path,
    dtype: torch.dtype,
    attn_implementation: str,
    trust_remote_code: bool = False,
    config_overrides: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Build the language model of ``folder`` on meta: shapes and code, no memory.

    An encoder-decoder or a masked language model where its config says so, else a causal one.

    Raises:
        ModelError: if the architecture is unknown, needs code that is not trusted, or an override does not go with it.
    """
    config = load_config(folder, trust_remote_code, config_overrides)
    try:
        with torch.device("meta"):
            model = _auto_class(config).from_config(
                config, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code
            )
    except (ValueError, KeyError, OSError, ImportError) as error:
        raise not_buildable(folder, error) from error
    model.requires_grad_(False)
    return model.eval()


def _auto_class(config: Any) -> Any:
    if getattr(config, "is_encoder_decoder", False):
        return AutoModelForSeq2SeqLM
    names = getattr(config, "architectures", None) or []
    return AutoModelForMaskedLM if names and names[0].endswith("ForMaskedLM") else AutoModelForCausalLM


def task_type(model: PreTrainedModel) -> str | None:
    """Return what PEFT calls the model's task: ``CAUSAL_LM``, ``SEQ_2_SEQ_LM``, or None for a masked one."""
    found = _auto_class(model.config)
    return {AutoModelForCausalLM: "CAUSAL_LM", AutoModelForSeq2SeqLM: "SEQ_2_SEQ_LM"}.get(found)


def build_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of ``folder``.

    Raises:
        ModelError: if it has none that transformers can load.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # of no special kind where tokenizer.json is damaged
        if "trust_remote_code" in str(error):
            raise not_buildable(folder, error) from error
        raise ModelError(f"model.name: {folder} has no usable tokenizer: {error}") from error


def read_shapes(model: PreTrainedModel) -> ModelShapes:
    """Read off a (meta) transformers model what a plan needs to know.

    Raises:
        ModelError: if it has no input embedding, output head or repeated layers where transformers puts them.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    layers = decoder_layers(model)
    if not isinstance(head, nn.Linear) or embedding is None or not layers:
        raise ModelError(
            f"{type(model).__name__}: no embedding, linear head and repeated layers: not a language model?"
        )
    names = {module: name for name, module in model.named_modules()}
    config = model.config.get_text_config()
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())  # T5's wo: its code looks at the weight's dtype
    linears = tuple(
        x
        for name, m in model.named_modules()
        if m is not head and kept.isdisjoint(name.split("."))
        for x in _linears(name, m)
    )
    return ModelShapes(
        parameters={name: tuple(p.shape) for name, p in model.named_parameters()},
        linears=linears,
        layers=tuple(names[layer] for layer in layers),
        embedding=names[embedding],
        head=names[head],
        tied=head.weight is embedding.weight,
        hidden_size=config.hidden_size,
        vocab_size=head.out_features,
        num_attention_heads=config.num_attention_heads,
        edges_apart=task_type(model) == "CAUSAL_LM",
        max_positions=getattr(config, "max_position_embeddings", None) or 0,
        experts_per_token=getattr(config, "num_experts_per_tok", None) or 0,
    )


def _linears(name: str, module: nn.Module) -> Iterator[LinearShape]:
    """Yield what of a module can be stored in 4-bit: its weight, or the stacked weights of its experts."""
    if isinstance(module, nn.Linear):
        yield LinearShape(name, module.out_features, module.in_features, module.bias is not None)
    elif isinstance(module, Conv1D):
        yield LinearShape(name, module.nf, module.nx, True, transposed=True)
    elif getattr(module, "has_gate", None) is not None and not (module.is_transposed or module.has_bias):
        for key in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"):
            weight = getattr(module, key, None)
            if isinstance(weight, nn.Parameter) and weight.dim() == 3:
                count, rows, columns = weight.shape
                yield LinearShape(f"{name}.{key}", rows, columns, count=count, stacked=True)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the layers: what transformers says must not be split across devices, but for what holds the embedding."""
    classes = set(model._no_split_modules or [])  # read only; spelt so by transformers since v4
    table = model.get_input_embeddings()
    found = [module for module in model.modules() if type(module).__name__ in classes]
    return [module for module in found if all(inner is not table for inner in module.modules())]


def restore_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Fill the non-persistent buffers (rotary frequencies) after ``to_empty``: no file holds them.

    Uses transformers' own initialisation of the module that owns each buffer.

    Raises:
        ModelError: if a buffer is of a module that transformers does not initialise.
    """
    for name, module in model.named_modules():
        buffers = {k: b for k, b in module.named_buffers(recurse=False) if k in module._non_persistent_buffers_set}
        if not buffers or isinstance(module, QuantMatrices):  # the latter is filled with its weight
            continue
        with torch.no_grad(), guard_torch_init_functions():
            for buffer in buffers.values():
                buffer.fill_(float("nan")) if buffer.is_floating_point() else buffer.zero_()
            model._init_weights(module)
        for key, buffer in buffers.items():
            if buffer.is_floating_point() and not bool(torch.isfinite(buffer).all()):
                raise ModelError(f"{type(module).__name__} ({name}): buffer {key} cannot be made after loading.")


_SINKS = ("gpt_oss",)
"""Models whose attention adds sinks to the scores."""


def attention_for(device: torch.device, asked: str, model_config: Any) -> str:
    """Return the attention implementation: the one asked for, or for ``auto`` the fastest one that computes the same.

    On an accelerator that is flash attention where the package is installed, else sdpa; on a CPU `blockwise`, for
    causal models without soft caps, sinks or dropout in their attention.
    """
    if asked != "auto":
        return asked
    text = model_config.get_text_config()
    special = any(getattr(text, key, None) for key in ("attn_logit_softcapping", "attention_dropout", "attn_pdrop"))
    if device.type != "cpu":
        flash = is_flash_attn_2_available() and not special
        return "flash_attention_2" if flash else "sdpa"
    causal = _auto_class(model_config) is AutoModelForCausalLM and text.model_type not in _SINKS
    return BLOCKWISE if causal and not special else "eager"
