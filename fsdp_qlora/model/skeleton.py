"""The transformers model on the meta device, its tokenizer, its shapes, and its buffers once it is real."""

from __future__ import annotations

import os
from collections.abc import Mapping
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

from fsdp_qlora.config.convert import nearest
from fsdp_qlora.errors import FsdpQloraError, ModelError, typed_line
from fsdp_qlora.files import own_file
from fsdp_qlora.model.attention import BLOCKWISE  # noqa: F401 - registers it
from fsdp_qlora.model.construct import (
    float32_parameters,
    keep_in_float32,
    make_buffers,
    parameters_on_meta,
    unmade_buffers,
)
from fsdp_qlora.model.linears import is_plain_linear, replaceable_linears
from fsdp_qlora.model.model_config import load_config, not_buildable, require_sane
from fsdp_qlora.model.peft_names import names_taken_for_experts, renamed_by_peft
from fsdp_qlora.plan.layout import ModelShapes

_TOKENIZER_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "additional_chat_templates", "*/*.jinja")
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
    from huggingface_hub import constants, snapshot_download

    folder = Path(name).absolute()
    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=_DOWNLOAD_PATTERNS, tqdm_class=_TerminalBar)
        )
    except Exception as error:  # the hub's, or those of whichever HTTP library it stands on
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", "") else ""
        raise ModelError(
            f"model.name: {name} is no folder here and the hub did not give it{offline}: {typed_line(error)} "
            f"Looked for: the folder {folder}{_beside(folder)}; then {name} on {constants.ENDPOINT}. A name that "
            "begins with ./ or / is always a folder's."
        ) from error


def _beside(folder: Path) -> str:
    """Return what a missing folder may be a misspelling of, to be put behind its name."""
    try:
        there = sorted(place.name for place in folder.parent.iterdir() if place.is_dir())
    except OSError:  # nor is there a folder that would hold it
        return ""
    return f" ({folder.parent.name} is here, without it.{nearest(folder.name, there)})"


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
    if getattr(config.get_text_config(decoder=True), "output_router_logits", False):
        raise ModelError(
            f"{folder}: output_router_logits in config.json asks for a loss that balances experts over a whole batch, "
            "which is not computed here. Set model.config_overrides.output_router_logits=false to train without it."
        )
    for key in ("layerdrop", "decoder_layerdrop", "encoder_layerdrop"):
        if getattr(config.get_text_config(decoder=True), key, None):
            raise ModelError(
                f"{folder}: {key} in config.json leaves out whole layers at random, other ones on each rank. Set "
                f"model.config_overrides.{key}=0 to train without it."
            )
    try:
        with parameters_on_meta():
            model = _auto_class(config).from_config(
                config, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code
            )
    except FsdpQloraError:
        raise
    except Exception as error:  # whatever upstream's code makes of odd values in config.json
        if isinstance(error, KeyError) and error.args == (attn_implementation,):  # a class with a table of its own
            raise ModelError(
                f"model.attn_implementation: the code of {config.model_type} has no {attn_implementation}; use eager."
            ) from error
        raise not_buildable(folder, error) from error
    if unmade := unmade_buffers(model):
        raise ModelError(f"{type(model).__name__}: buffer {unmade[0]} is in no file and made by nothing.")
    make_buffers(model)
    keep_in_float32(model, dtype)
    model.requires_grad_(False)
    return model.eval()


def _auto_class(config: Any) -> Any:
    if getattr(config, "is_encoder_decoder", False):
        return AutoModelForSeq2SeqLM
    names = getattr(config, "architectures", None)
    first = names[0] if isinstance(names, list) and names else None
    return AutoModelForMaskedLM if str(first).endswith("ForMaskedLM") else AutoModelForCausalLM


def is_causal(model_config: Any) -> bool:
    """Whether a config is that of a causal language model, and not of an encoder-decoder or a masked one."""
    return _auto_class(model_config) is AutoModelForCausalLM


def task_type(model: PreTrainedModel) -> str | None:
    """Return what PEFT calls the model's task: ``CAUSAL_LM``, ``SEQ_2_SEQ_LM``, or None for a masked one."""
    found = _auto_class(model.config)
    return {AutoModelForCausalLM: "CAUSAL_LM", AutoModelForSeq2SeqLM: "SEQ_2_SEQ_LM"}.get(found)


def _longest_list(model: nn.Module) -> list[nn.Module]:
    """Return the modules of the longest list of modules of one class: the layers, where transformers does not say."""
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(x) for x in m}) == 1]
    return max(
        lists, key=lambda layers: (len(layers), sum(p.numel() for x in layers for p in x.parameters())), default=[]
    )


def build_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of ``folder``.

    Raises:
        ModelError: if it has none that transformers can load.
        SecurityError: if one of its files is a link to elsewhere: the adapter's folder gets a copy of the tokenizer.
    """
    for pattern in _TOKENIZER_FILES:
        for file in folder.glob(pattern):
            own_file(folder, str(file.relative_to(folder)))
    require_sane(folder)  # which transformers reads for some tokenizers, too
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        tokenizer("a")  # odd settings show when it is used
    except Exception as error:  # of no special kind where tokenizer.json is damaged
        if "trust_remote_code" in str(error):
            raise not_buildable(folder, error) from error
        raise ModelError(f"model.name: {folder} has no usable tokenizer: {error}") from error
    return tokenizer


def read_shapes(model: PreTrainedModel) -> ModelShapes:
    """Read off a (meta) transformers model what a plan needs to know.

    Raises:
        ModelError: if it has no input embedding, output head or repeated layers where transformers puts them.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    layers = decoder_layers(model)
    if not isinstance(head, nn.Linear) or not is_plain_linear(head) or not hasattr(embedding, "weight") or not layers:
        raise ModelError(
            f"{type(model).__name__}: no embedding, linear head and repeated layers: not a language model that can be "
            "trained here."
        )
    _refuse_shared(model, layers)
    names = {module: name for name, module in model.named_modules()}
    config = model.config.get_text_config()
    linears = tuple(x for x in replaceable_linears(model) if x.name != names[head])
    taken, whole = names_taken_for_experts(model.config), [x.name for x in linears if not x.stacked]
    misnamed = renamed_by_peft(model, whole) | {name for name in whole if name.rpartition(".")[2] in taken}
    return ModelShapes(
        parameters={name: tuple(p.shape) for name, p in model.named_parameters()},
        linears=linears,
        layers=tuple(names[layer] for layer in layers),
        embedding=names[embedding],
        head=names[head],
        tied=head.weight is embedding.weight,
        hidden_size=int(embedding.weight.shape[1]),  # type: ignore[index]
        vocab_size=head.out_features,
        num_attention_heads=_number(config, "num_attention_heads"),
        edges_apart=task_type(model) == "CAUSAL_LM",
        max_positions=_number(config, "max_position_embeddings"),
        experts_per_token=_number(config, "num_experts_per_tok"),
        not_adapted=frozenset(misnamed),
        float32=frozenset(float32_parameters(model)),
    )


def _refuse_shared(model: PreTrainedModel, layers: list[nn.Module]) -> None:
    """Refuse layers that have weights in common: each layer is sharded, gathered and freed by itself."""
    owner: dict[nn.Parameter, nn.Module] = {}
    for layer in layers:
        for parameter in layer.parameters():
            if owner.setdefault(parameter, layer) is not layer:
                raise ModelError(
                    f"{type(model).__name__}: its layers share weights, and such layers cannot be sharded."
                )


def _number(config: Any, key: str) -> int:
    """Return a setting that is one number, 0 where there is none (or one for each layer)."""
    try:
        value = getattr(config, key, None)
    except Exception:  # transformers refuses, with an error of its own, to give one number for what layers differ in
        return 0
    return value if isinstance(value, int) else 0


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the layers that text runs through: what transformers says must not be split across devices.

    Not what holds the embedding, nor, in a causal model that also sees or hears, the layers that only images or sound
    run through.
    """
    classes = set(model._no_split_modules or [])  # read only; spelt so by transformers since v4
    table = model.get_input_embeddings()
    found = [module for module in model.modules() if type(module).__name__ in classes] or _longest_list(model)
    found = [module for module in found if all(inner is not table for inner in module.modules())]
    inside = {inner for module in found for inner in module.modules() if inner is not module}
    found = [module for module in found if module not in inside]
    if task_type(model) == "CAUSAL_LM" and hasattr(model, "get_decoder"):
        within = set(model.get_decoder().modules())
        found = [module for module in found if module in within] or found
    return found
