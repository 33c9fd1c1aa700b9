"""The transformers model on the meta device, with real buffers, and its shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from fsdp_qlora.adapters.names import names_taken_for_experts, renamed_by_peft
from fsdp_qlora.attention.blockwise import BLOCKWISE  # noqa: F401 - registers it
from fsdp_qlora.errors import FsdpQloraError, ModelError
from fsdp_qlora.heads.upstream import after_head
from fsdp_qlora.model.config import load_config, not_buildable
from fsdp_qlora.model.construct import (
    float32_parameters,
    keep_in_float32,
    left_dense,
    make_buffers,
    parameters_on_meta,
    unmade_buffers,
)
from fsdp_qlora.model.families import auto_class, blocks_beside, decoder_layers, reads_images, task_type
from fsdp_qlora.model.replaceable import is_plain_linear, replaceable_linears
from fsdp_qlora.objectives import Objective, build_objective
from fsdp_qlora.objectives.vision import FAMILIES
from fsdp_qlora.shapes.linears import LinearShape, ModelShapes
from fsdp_qlora.shapes.tower import Tower


def build_skeleton(
    folder: Path,
    dtype: torch.dtype,
    attn_implementation: str,
    trust_remote_code: bool = False,
    config_overrides: Mapping[str, Any] | None = None,
    objective: Objective | None = None,
) -> PreTrainedModel:
    """Build the model in ``folder`` on meta, as ``objective`` needs it: shapes and code, no memory.

    Without an objective, or with one of tokens, it is a language model: an encoder-decoder or a masked one if its
    config says so, else a causal one.

    Raises:
        ModelError: if the architecture is unknown, needs code that is not trusted, or an override does not fit it.
    """
    config = load_config(folder, trust_remote_code, config_overrides)
    _require_computable(folder, config)
    if objective is not None and objective.auto_class is not None:
        objective = build_objective(objective.settled(folder, config))
        objective.configure(config)
    kind = _class_for(config, objective)
    try:
        with parameters_on_meta():
            model = kind.from_config(
                config, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code
            )
    except FsdpQloraError:
        raise
    except Exception as error:  # odd values in config.json can raise anything in upstream's code
        if isinstance(error, KeyError) and error.args == (attn_implementation,):  # a class with its own table
            raise ModelError(
                f"model.attn_implementation: the code of {config.model_type} does not support {attn_implementation}; "
                "use eager."
            ) from error
        raise not_buildable(folder, error) from error
    _require_embedding(model)
    if objective is not None:
        objective.prune(model)
    if unmade := unmade_buffers(model):
        raise ModelError(f"{type(model).__name__}: buffer {unmade[0]} is not in any file, and no code creates it.")
    make_buffers(model)
    keep_in_float32(model, dtype)
    model.requires_grad_(False)
    return model.eval()


def _require_computable(folder: Path, config: PreTrainedConfig) -> None:
    if getattr(config.get_text_config(decoder=True), "output_router_logits", False):
        raise ModelError(
            f"{folder}: output_router_logits in config.json asks for a loss that balances experts over a whole batch, "
            "which is not computed here. Set model.config_overrides.output_router_logits=false to train without it."
        )
    for key in ("layerdrop", "decoder_layerdrop", "encoder_layerdrop"):
        if any(getattr(own, key, None) for own in _configs(config)):
            raise ModelError(
                f"{folder}: {key} in config.json drops whole layers at random, different ones on each rank. Set "
                f"model.config_overrides.{key}=0 to train without it."
            )


def _configs(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """Return the configs of what is trained: of an encoder-decoder its own, and those of both sides if it has them.

    ``get_text_config(decoder=True)`` returns a copy of an encoder-decoder's in which settings of its sides are lost.
    """
    if not getattr(config, "is_encoder_decoder", False):
        return [config.get_text_config(decoder=True)]
    return [config, *(inner for inner in vars(config).values() if isinstance(inner, PreTrainedConfig))]


def _class_for(config: Any, objective: Objective | None) -> Any:
    """Return the auto class that builds the model."""
    if objective is not None and objective.auto_class is not None:
        return getattr(transformers, objective.auto_class)
    if reads_images(config):
        raise ModelError(
            f"model.name: a {config.model_type} reads images. Such models are planned, trained, evaluated and exported "
            "as adapters (objective=sft with rows); answers, and bases that are merged or converted, are not supported "
            "for them yet. Use plain transformers and PEFT with the adapter."
        )
    return auto_class(config)


def _require_embedding(model: PreTrainedModel) -> None:
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:
        embedding = None
    if not isinstance(embedding, nn.Module):  # Perceiver's is a parameter
        raise ModelError(
            f"{type(model).__name__}: its class does not say where its input embedding is (those of many convolutional "
            "networks do not), so it cannot be sharded here."
        )


def read_shapes(model: PreTrainedModel) -> ModelShapes:
    """Read from a (meta) transformers model what a plan needs to know.

    Raises:
        ModelError: if the input embedding, output head or repeated layers are not where transformers puts them.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    layers = decoder_layers(model)
    if head is None and task_type(model) not in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        return _headless_shapes(model, embedding, layers)
    if not isinstance(head, nn.Linear) or not is_plain_linear(head) or not hasattr(embedding, "weight") or not layers:
        raise ModelError(
            f"{type(model).__name__}: without an embedding, a linear head and repeated layers, this is not a language "
            "model that can be trained here."
        )
    _refuse_shared(model, layers)
    names = {module: name for name, module in model.named_modules()}
    config = model.config.get_text_config()
    linears = tuple(x for x in replaceable_linears(model) if x.name != names[head])
    return ModelShapes(
        parameters={name: tuple(p.shape) for name, p in model.named_parameters()},
        linears=linears,
        layers=tuple(names[layer] for layer in layers),
        embedding=_first_owner(model, embedding.weight),  # type: ignore[arg-type]
        head=names[head],
        tied=head.weight is embedding.weight,
        hidden_size=int(embedding.weight.shape[1]),  # type: ignore[index]
        vocab_size=head.out_features,
        num_attention_heads=_number(config, "num_attention_heads"),
        edges_apart=task_type(model) == "CAUSAL_LM",
        max_positions=_number(config, "max_position_embeddings"),
        experts_per_token=_number(config, "num_experts_per_tok"),
        not_adapted=_not_adapted(model, linears),
        float32=frozenset(float32_parameters(model)),
        left_dense=left_dense(model),
        recomputes=model.supports_gradient_checkpointing,
        beside=_beside(model, linears, layers),
        tower=_tower(model, layers),
        capped=bool(getattr(config, "final_logit_softcapping", None)),
        by_code=_by_code(model),
    )


def _headless_shapes(model: PreTrainedModel, embedding: nn.Module, layers: list[nn.Module]) -> ModelShapes:
    """Return the shapes of a model whose head, if it has one, is no table of tokens: a classifier, an encoder."""
    if not layers:
        raise ModelError(f"{type(model).__name__}: it has no repeated layers, so it cannot be sharded here.")
    _refuse_shared(model, layers)
    names = {module: name for name, module in model.named_modules()}
    config, linears = model.config.get_text_config(), tuple(replaceable_linears(model))
    table = getattr(embedding, "weight", None)
    return ModelShapes(
        parameters={name: tuple(p.shape) for name, p in model.named_parameters()},
        linears=linears,
        layers=tuple(names[layer] for layer in layers),
        embedding=names[embedding] if table is not None else "",
        head="",
        tied=False,
        hidden_size=_number(config, "hidden_size"),
        vocab_size=_number(config, "num_labels") or 1,
        num_attention_heads=_number(config, "num_attention_heads"),
        edges_apart=False,
        max_positions=_number(config, "max_position_embeddings"),
        experts_per_token=_number(config, "num_experts_per_tok"),
        not_adapted=_not_adapted(model, linears),
        float32=frozenset(float32_parameters(model)),
        left_dense=left_dense(model),
        recomputes=model.supports_gradient_checkpointing,
    )


def _beside(model: PreTrainedModel, linears: Sequence[LinearShape], layers: Sequence[nn.Module]) -> frozenset[str]:
    """Return the linears that only images pass through: those outside a decoder that reads them among its tokens."""
    if not reads_images(model.config):
        return frozenset()
    inside = {name for name, module in model.named_modules() if any(module is layer for layer in layers)}
    return frozenset(x.name for x in linears if not any(x.name.startswith(f"{layer}.") for layer in inside))


def _tower(model: PreTrainedModel, layers: Sequence[nn.Module]) -> Tower | None:
    """Return the vision tower of a decoder that reads images among its tokens, if its family is known."""
    if not reads_images(model.config) or model.config.model_type not in FAMILIES:
        return None
    names = {module: name for name, module in model.named_modules()}
    blocks = tuple(names[block] for block in blocks_beside(model, layers))
    return FAMILIES[model.config.model_type](model.config).tower(blocks)


def _by_code(model: PreTrainedModel) -> bool:
    """Whether upstream's code runs on the head's product; the build refuses a model in which it cannot."""
    try:
        return after_head(model).code is not None
    except ModelError:
        return False


def _first_owner(model: PreTrainedModel, parameter: nn.Parameter) -> str:
    """Return the first module that has a parameter: a table of tokens may be that of several (Marian's)."""
    return next(name for name, own in model.named_parameters() if own is parameter).rpartition(".")[0]


def _not_adapted(model: PreTrainedModel, linears: Sequence[LinearShape]) -> frozenset[str]:
    """Return the linears onto which plain PEFT could not load an adapter."""
    taken, whole = names_taken_for_experts(model.config), [x.name for x in linears if not x.stacked]
    return frozenset(renamed_by_peft(model, whole) | {name for name in whole if name.rpartition(".")[2] in taken})


def _refuse_shared(model: PreTrainedModel, layers: list[nn.Module]) -> None:
    """Refuse layers that share weights: each layer is sharded, gathered and freed on its own."""
    owner: dict[nn.Parameter, nn.Module] = {}
    for layer in layers:
        for parameter in layer.parameters():
            if owner.setdefault(parameter, layer) is not layer:
                raise ModelError(f"{type(model).__name__}: its layers share weights, so they cannot be sharded.")


def _number(config: Any, key: str) -> int:
    """Return an integer setting, or 0 if it is missing (or differs between layers)."""
    try:
        value = getattr(config, key, None)
    except Exception:  # transformers raises an error of its own if the layers differ in this setting
        return 0
    return value if isinstance(value, int) else 0
