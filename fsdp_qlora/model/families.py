"""The kind of a language model, as upstream declares it, and which modules are its layers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)

from fsdp_qlora.attention.blockwise import BLOCKWISE  # noqa: F401 - registers it


def auto_class(config: Any) -> Any:
    """Return the auto class of transformers that builds the language model of a config."""
    if getattr(config, "is_encoder_decoder", False):
        return AutoModelForSeq2SeqLM
    names = getattr(config, "architectures", None)
    first = names[0] if isinstance(names, list) and names else None
    return AutoModelForMaskedLM if str(first).endswith("ForMaskedLM") else AutoModelForCausalLM


def is_causal(model_config: Any) -> bool:
    """Whether a config describes a causal language model rather than an encoder-decoder or a masked one."""
    return auto_class(model_config) is AutoModelForCausalLM


def reads_images(model_config: Any) -> bool:
    """Whether upstream builds a config only as a model that reads images among the tokens of a text.

    Some such models are causal language models, too (Gemma 3): here they read text alone.
    """
    kind = type(model_config)
    return kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and kind not in MODEL_FOR_CAUSAL_LM_MAPPING


_HEADS = {
    "ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS", "ForImageClassification": None,
    "ForMaskedLM": None,
}  # fmt: skip
"""Ends of class names -> PEFT's names for their tasks; None where it has none."""


def task_type(model: PreTrainedModel) -> str | None:
    """Return PEFT's name for the model's task, such as ``CAUSAL_LM``; None if it has none."""
    for end, task in _HEADS.items():
        if type(model).__name__.endswith(end):
            return task
    if model.get_output_embeddings() is None and type(model).__name__.endswith("Model"):
        return "FEATURE_EXTRACTION"
    kind = auto_class(model.config)
    if kind is AutoModelForSeq2SeqLM and model.main_input_name != "input_ids":
        return None  # PEFT's wrapper would pass `input_ids` to a model that hears
    return {AutoModelForCausalLM: "CAUSAL_LM", AutoModelForSeq2SeqLM: "SEQ_2_SEQ_LM"}.get(kind)


def language_task(model: PreTrainedModel) -> str | None:
    """Return `task_type` of a language model; None for others, whose heads PEFT would wrap if it knew the task."""
    task = task_type(model)
    return task if task in ("CAUSAL_LM", "SEQ_2_SEQ_LM") else None


def _repeated(model: PreTrainedModel) -> list[nn.Module]:
    """Return the layers where transformers declares none: of both sides, in an encoder-decoder (Marian)."""
    sides = [model.get_encoder(), model.get_decoder()] if model.config.is_encoder_decoder else [model]
    return list(dict.fromkeys(layer for side in sides for layer in _most_repeated(side)))


def _most_repeated(model: nn.Module, without: Collection[nn.Module] = ()) -> list[nn.Module]:
    """Return the modules in lists, matrices in them, that are of the most frequent class; the larger ones of two."""
    by_class: dict[type[nn.Module], list[nn.Module]] = {}
    for block in _listed(model):
        if block not in without and any(parameter.dim() > 1 for parameter in block.parameters()):
            by_class.setdefault(type(block), []).append(block)
    return max(by_class.values(), key=lambda some: (len(some), sum(map(_numel, some))), default=[])


def _listed(model: nn.Module) -> Iterator[nn.Module]:
    """Yield what lists hold, also lists of lists (Funnel), but not lists inside of that (experts of a layer)."""
    for child in model.children():
        if isinstance(child, nn.ModuleList) and not any(isinstance(inner, nn.ModuleList) for inner in child):
            yield from child
        else:
            yield from _listed(child)


def _of_tables(module: nn.Module) -> bool:
    """Whether most weights of a module are rows to look up."""
    return 2 * sum(_numel(inner) for inner in module.modules() if isinstance(inner, nn.Embedding)) > _numel(module)


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _around(model: nn.Module, declared: list[nn.Module]) -> list[nn.Module]:
    """Return the blocks around what is declared: some classes declare their layers' attention alone (Longformer)."""
    holder: dict[nn.Module, nn.Module] = {}
    for some in model.modules():  # lists inside of others come later: the block next to a module counts
        for block in some if isinstance(some, nn.ModuleList) else ():
            holder |= dict.fromkeys(block.modules(), block)
    return list(dict.fromkeys(holder.get(module, module) for module in declared))


def blocks_beside(model: nn.Module, layers: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the blocks of a vision tower beside the decoder's ``layers``."""
    return _most_repeated(model, layers)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the layers that text passes through: the modules transformers declares must not be split across devices.

    Modules that contain the embedding, or are tables themselves (of a decoder that has its own), are excluded. So are,
    in a causal multimodal model, the layers that only images or sound pass through.
    """
    classes = set(model._no_split_modules or [])  # read only; transformers has used this name since v4
    table = model.get_input_embeddings()
    layers = [module for module in model.modules() if type(module).__name__ in classes]
    layers = _around(model, layers) or _repeated(model)
    layers = [m for m in layers if all(inner is not table for inner in m.modules()) and not _of_tables(m)]
    inside = {inner for module in layers for inner in module.modules() if inner is not module}
    layers = [module for module in layers if module not in inside]
    if task_type(model) == "CAUSAL_LM" and hasattr(model, "get_decoder"):
        within = set(model.get_decoder().modules())
        layers = [module for module in layers if module in within] or layers
    return layers
