"""Rules on objectives that train other than causal language models. See `fsdp_qlora.config.rules`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fsdp_qlora.config.auto import asked, number, switch
from fsdp_qlora.config.choices import CAN_SPLIT, OF_IMAGES, ROW_BY_ROW, WITH_LABELS
from fsdp_qlora.config.schema import ObjectiveSettings, RunConfig

Rule = Callable[[RunConfig], Iterator[str]]


def _rows(config: RunConfig) -> Iterator[str]:
    name, data = config.objective.name, config.data
    if name not in ROW_BY_ROW:
        return
    for key in ("packing", "padding_free", "streaming", "template"):
        if getattr(data, key):
            yield f"data.{key}: objective={name} has no use for it; leave it out."
    if data.truncation == "split" and name not in CAN_SPLIT:
        yield f"data.truncation: a row of objective={name} cannot be split; choose right, left or drop."
    if data.train_on != "assistant":
        yield f"data.train_on: objective={name} learns labels, not answers; leave it out."
    if asked(data.format) is not None:
        yield f"data.format: objective={name} has columns of its own; leave it out (data.columns renames them)."


def _model(config: RunConfig) -> Iterator[str]:
    name, train = config.objective.name, config.train
    if name not in ROW_BY_ROW:
        return
    if config.model.add_tokens:
        yield f"model.add_tokens: objective={name} trains no rows of embedding or head; leave it out."
    if config.quant.embeddings != "none":
        yield f"quant.embeddings: only those of causal language models can be quantized, not with objective={name}."
    if train.compile == "true":
        yield f"train.compile: objective={name} runs uncompiled; set it to false or auto."
    if asked(train.kernels) not in (None, "torch"):
        yield f"train.kernels: objective={name} runs upstream's modules; set it to torch or auto."
    if train.sample_prompts:
        yield f"train.sample_prompts: a model of objective={name} writes no answers; leave it out."
    if config.lora.starts_from_rows:
        yield f"lora.init_lora_weights: EVA searches causal language models, not with objective={name}."


def _pairs(config: RunConfig) -> Iterator[str]:
    if config.objective.name == "embedding" and number(config.train.global_batch_size) == 1:
        yield "train.global_batch_size: with objective=embedding a row's wrong answers are the other rows; at least 2."


def _labels(config: RunConfig) -> Iterator[str]:
    objective = config.objective
    if objective.name not in WITH_LABELS:
        for key in ("labels", "class_weights"):
            if getattr(objective, key):
                yield f"objective.{key}: objective={objective.name} has no labels; leave it out."
        if asked(objective.problem_type) is not None:
            yield f"objective.problem_type: objective={objective.name} has no labels; leave it out."
        return
    one_of_each = (None, "single_label_classification")
    if objective.name == "token_classification" and asked(objective.problem_type) not in one_of_each:
        yield f"objective.problem_type: objective={objective.name} has one label for each word; leave it out."
    if twice := sorted({name for name in objective.labels if objective.labels.count(name) > 1}):
        yield f"objective.labels: {', '.join(map(repr, twice))} is named more than once."
    if unknown := [name for name in objective.class_weights if objective.labels and name not in objective.labels]:
        yield f"objective.class_weights: {unknown[0]!r} is not one of objective.labels."
    if odd := [name for name, value in objective.class_weights.items() if not value > 0]:
        yield f"objective.class_weights: the factor of {odd[0]!r} must be above 0."


_OWN = {
    "masked_lm": ("mask_probability", "whole_words"),
    "embedding": ("temperature", "pooling"),
    "seq2seq": ("max_target_length", "source_prefix", "generate_rows", "source", "language", "task"),
    "image_classification": ("image_size", "augmentation"),
}
"""Objectives -> settings that no other reads."""


def _own(config: RunConfig) -> Iterator[str]:
    objective, defaults = config.objective, ObjectiveSettings()
    for name, keys in _OWN.items():
        for key in keys:
            if objective.name != name and getattr(objective, key) != getattr(defaults, key):
                yield f"objective.{key}: only objective={name} reads it, not {objective.name}; leave it out."
    if not objective.mask_probability:
        yield "objective.mask_probability: must be above 0, or there is nothing to predict."


def _images(config: RunConfig) -> Iterator[str]:
    if config.objective.name not in OF_IMAGES:
        return
    for key, value in (("tasks", config.evaluate.tasks), ("prompts", config.evaluate.prompts)):
        if value:
            yield f"evaluate.{key}: a model of objective={config.objective.name} writes no texts; leave it out."


def _image_chats(config: RunConfig) -> Iterator[str]:
    data, train, wanted = config.data, config.train, switch(config.objective.images)
    if config.quant.vision != "none" and (config.objective.name != "sft" or wanted is False):
        yield "quant.vision: only a model of objective=sft that reads images has a vision tower; set it to none."
    if config.objective.name != "sft":
        if wanted is not None:
            yield f"objective.images: only objective=sft reads it, not {config.objective.name}; leave it out."
        return
    if not wanted:
        return
    for key in ("packing", "padding_free", "streaming"):
        if getattr(data, key):
            yield f"data.{key}: rows of a model that reads images do not share a sequence; leave it out."
    if data.truncation == "split":
        yield "data.truncation: a row of a model that reads images cannot be split; choose right, left or drop."
    for key, what in {
        "model.add_tokens": config.model.add_tokens, "quant.embeddings": config.quant.embeddings != "none",
        "train.compile": train.compile == "true", "train.kernels": asked(train.kernels) not in (None, "torch"),
        "train.sample_prompts": train.sample_prompts, "evaluate.prompts": config.evaluate.prompts,
        "evaluate.tasks": config.evaluate.tasks, "lora.init_lora_weights": config.lora.starts_from_rows,
        "plan.simulate": config.plan.simulate, "fsdp.offload_modules": config.fsdp.offload_modules,
    }.items():  # fmt: skip
        if what:
            yield f"{key}: not supported for a model that reads images; leave it out."


OBJECTIVE_RULES: tuple[Rule, ...] = (_rows, _model, _labels, _pairs, _own, _images, _image_chats)
