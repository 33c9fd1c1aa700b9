"""Tasks beside chat on tiny random models, and the same training by transformers' own loss and stock PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import nn
from transformers import AutoTokenizer

from fsdp_qlora.adapters.experts import peft_config
from fsdp_qlora.adapters.names import trainable_parameters
from fsdp_qlora.adapters.whole import as_saved
from fsdp_qlora.checks import reference
from fsdp_qlora.data.columns import ColumnRows
from fsdp_qlora.data.labels import IGNORE, ROWS, TOKENS
from fsdp_qlora.data.loader import Cut, Loader, MicroBatch, NamedBatch, weights_of
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.model.config import load_config
from fsdp_qlora.objectives import build_objective
from fsdp_qlora.run.evaluate import evaluate_prepared
from fsdp_qlora.run.prepared import Prepared
from tests.build import build, held_bytes, whole
from tests.families import write_family
from tests.images import write_classes, write_vision
from tests.speech import write_recordings, write_whisper
from tests.tiny import sentence

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A task: its model, its rows, its settings, and how upstream is asked for the same loss."""

    family: str
    row: Callable[[int], dict[str, Any]] | None
    """None: the rows are images in class folders, or recordings."""
    objective: dict[str, Any]
    inputs: Callable[[Tensors], dict[str, Any]] = dict
    """The micro-batch's tensors -> upstream's arguments, labels included."""
    groups: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    """More settings of the tiny model."""
    divided_by: str = ROWS
    """What upstream's loss of a micro-batch is a mean over."""
    together: Callable[[nn.Module, list[Tensors]], torch.Tensor] | None = None
    """Computes the loss of a whole global batch, where it is no sum over micro-batches."""

    def write(self, folder: Path) -> tuple[str, dict[str, Any]]:
        """Write model and rows; return the model's folder and the settings of a run."""
        if self.family == "whisper":
            model, rows = write_whisper(folder / "base", **self.more), write_recordings(folder / "heard", 40)
        elif self.row is None:
            model, rows = write_vision(folder / "base", self.family, **self.more), folder / "pictures"
            write_classes(rows, NAMES, 40)
        else:
            model, rows = write_family(folder / "base", self.family, **self.more), folder / "rows.jsonl"
            rows.write_text("".join(json.dumps(self.row(number)) + "\n" for number in range(40)))
        if self.objective["name"] == "masked_lm":
            tokenizer: Any = AutoTokenizer.from_pretrained(model)
            tokenizer.mask_token = "<|endoftext|>"
            tokenizer.save_pretrained(model)
        groups = {
            "data": {"train": str(rows), "eval_fraction": 0.2},
            "objective": self.objective,
            "precision": {"name": "fp32"},
            "schedule": {"name": "constant", "warmup_ratio": 0.0},
            "train": {"max_steps": 6},
        }
        for name, settings in self.groups.items():
            groups[name] = {**groups.get(name, {}), **settings}
        return str(model), groups


def upstream_model(prepared: Prepared) -> nn.Module:
    """Return transformers' own model of the task, its weights rounded as ours, in float32."""
    objective = build_objective(prepared.settings.objective)
    assert objective.auto_class is not None
    config = load_config(prepared.folder, False, {})
    objective.configure(config)
    model = getattr(transformers, objective.auto_class).from_pretrained(
        prepared.folder, config=config, dtype=torch.float32, attn_implementation="eager", ignore_mismatched_sizes=True
    )
    reference.round_weights(model, prepared.plan.quantized)
    return model.requires_grad_(False)


def upstream_losses(ranks: Ranks, folder: str, groups: dict[str, Any], kind: str) -> list[float]:
    """Train as plain transformers and PEFT do, from our first values and on our batches; return each step's loss."""
    prepared = build(ranks, folder, **groups)
    model, plan, train = upstream_model(prepared), prepared.plan, prepared.config.train
    objective = build_objective(prepared.settings.objective)
    config = peft_config(plan.targets, [], prepared.settings.lora, objective.task_type)
    values = {name: whole(parameter).detach().clone() for name, parameter in trainable_parameters(prepared.model)}
    adapted = reference.adapt(model, as_saved(config, plan.modules, prepared.shapes, model), values).train()  # type: ignore[arg-type]
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    settings = prepared.config.optim
    optimizer = torch.optim.AdamW(
        trained, lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps, weight_decay=0.0
    )
    assert prepared.data is not None and prepared.data.train is not None
    rows = prepared.data.encoder.training_rows(prepared.data.train, prepared.config.run.seed)
    assert isinstance(rows, ColumnRows)
    loader = Loader(rows, train.global_batch_size, Cut(train.micro_batch_size, 0, 1), prepared.config.run.seed)
    losses = []
    for step in range(train.max_steps):
        batch, total = loader.batch_at(step * train.global_batch_size), 0.0
        if (together := CASES[kind].together) is not None:
            loss = together(adapted, [part.tensors for part in batch.micro_batches])  # type: ignore[attr-defined]
            loss.backward()
            total = float(loss.detach())
        for part in batch.micro_batches if together is None else ():
            share = _weight(part, CASES[kind].divided_by) / batch.weights[CASES[kind].divided_by]
            loss = adapted(**CASES[kind].inputs(part.tensors)).loss * share  # type: ignore[attr-defined]
            loss.backward()
            total += float(loss.detach())
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    prepared.close()
    return losses


def _weight(part: MicroBatch, name: str) -> int:
    assert isinstance(part, NamedBatch)
    return len(part.rows) if name == ROWS else int((part.tensors["labels"] != IGNORE).sum())


def held_and_planned(ranks: Ranks, folder: str, groups: dict[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    """Return the bytes that this rank holds after a backward, by kind, and those planned for the fullest."""
    prepared = build(ranks, folder, **groups)
    objective, data = build_objective(prepared.settings.objective), prepared.data
    assert data is not None and data.train is not None
    micro_batch = data.encoder.rows(data.train).collate([0, 1], 0)
    sums = objective.sums(prepared.model.train(), micro_batch)
    torch.stack([value for value, _ in sums.values()]).sum().backward()
    held = held_bytes(prepared)
    del held["gradients"]
    return held, {kind: getattr(prepared.plan.bytes, kind) for kind in held}


def exported_outputs(ranks: Ranks, folder: str, groups: dict[str, Any], adapter: str) -> tuple[torch.Tensor, list[str]]:
    """Return the outputs of plain transformers and PEFT with an exported adapter for the first held-out rows."""
    prepared = build(ranks, folder, **groups)
    adapted = PeftModel.from_pretrained(upstream_model(prepared), adapter).eval()  # type: ignore[arg-type]
    assert prepared.data is not None
    rows = prepared.data.held_out
    assert isinstance(rows, ColumnRows)
    objective = build_objective(prepared.settings.objective)
    with torch.no_grad():
        sums = objective.sums(_AsOurs(adapted), rows.collate([0, 1, 2], 0))
    names = [name for name, _ in adapted.named_parameters() if "modules_to_save" in name]
    return torch.stack([value for value, _ in sums.values()]), names


def written_texts(ranks: Ranks, folder: str, groups: dict[str, Any]) -> tuple[list[Any], dict[str, float], float]:
    """Return what our model writes for each held-out row beside what was wanted, the metrics, and the loss."""
    prepared = build(ranks, folder, **groups)
    result = evaluate_prepared(prepared)
    prepared.close()
    return list(result.observed), result.metrics, result.loss


def upstream_texts(ranks: Ranks, folder: str, groups: dict[str, Any], **asked: Any) -> tuple[list[str], float]:
    """Return what plain transformers writes for each row alone, and the mean loss of all target tokens."""
    prepared = build(ranks, folder, **groups)
    model: Any = upstream_model(prepared).eval()
    assert prepared.data is not None
    rows = prepared.data.held_out
    assert isinstance(rows, ColumnRows)
    texts, total = [], 0.0
    greedy = deepcopy(model.generation_config)
    length = prepared.settings.objective.max_target_length
    greedy.update(max_new_tokens=length, do_sample=False, num_beams=1)
    for number in range(len(rows)):
        inputs = dict(rows.collate([number], 0).tensors)
        labels = inputs.pop("labels")
        inputs.pop("supervised")
        with torch.no_grad():
            total += float(model(**inputs, labels=labels).loss) * labels.numel()
            ids = model.generate(**inputs, generation_config=deepcopy(greedy), **asked)
        texts += prepared.tokenizer.batch_decode(ids, skip_special_tokens=True)
    prepared.close()
    return [text.strip() for text in texts], total / weights_of(rows, list(range(len(rows))))[TOKENS]


def exported_loss(ranks: Ranks, folder: str, groups: dict[str, Any], adapter: str) -> float:
    """Return the loss of plain transformers and PEFT with an exported adapter for all held-out rows in one batch."""
    prepared = build(ranks, folder, **groups)
    adapted: nn.Module = PeftModel.from_pretrained(upstream_model(prepared), adapter).eval()  # type: ignore[arg-type]
    assert prepared.data is not None
    rows = prepared.data.held_out
    assert isinstance(rows, ColumnRows)
    tensors = dict(rows.collate(list(range(len(rows))), 0).tensors)
    tensors.pop("supervised")
    with torch.no_grad():
        return float(adapted(**tensors).loss)


class _AsOurs(nn.Module):
    """A plain model under the one method that objectives call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def base(self) -> nn.Module:
        return self.model.get_base_model()  # type: ignore[operator]

    def outputs(self, **inputs: Any) -> Any:
        return self.model(**inputs)

    def losses(self, labels: torch.Tensor, supervised: torch.Tensor, **inputs: Any) -> torch.Tensor:
        logits = self.model(**inputs, labels=labels).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")[supervised]


def labelled(tensors: Tensors) -> dict[str, Any]:
    """Return upstream's arguments for rows with a label each."""
    return _with_labels(tensors, tensors["label"][:, 0].long())


def _with_labels(tensors: Tensors, labels: torch.Tensor) -> dict[str, Any]:
    return {name: value for name, value in tensors.items() if name != "label"} | {"labels": labels}


def _labelled(number: int) -> dict[str, Any]:
    words = sentence(number, 4 + number % 7).split()
    return {"tokens": words, "labels": [ENTITIES[(number + at) % 4] for at in range(len(words))]}


def _pair(number: int) -> dict[str, Any]:
    pair = {"anchor": sentence(number, 4 + number % 5), "positive": sentence(number + 2, 3 + number % 4)}
    return pair | ({"negative": sentence(number + 5, 4)} if number % 3 else {})


def _against_all(pooling: str) -> Callable[[nn.Module, list[Tensors]], torch.Tensor]:
    def loss(model: nn.Module, parts: list[Tensors]) -> torch.Tensor:
        texts: tuple[list[torch.Tensor], ...] = ([], [], [])
        for part in parts:
            mask = part["attention_mask"]
            hidden = model(input_ids=part["input_ids"], attention_mask=mask).last_hidden_state
            roles = [at for at, role in enumerate(("anchor", "positive", "negative")) for _ in part[role]]
            for role, states, own in zip(roles, hidden, mask.bool(), strict=True):
                vector = states[own].mean(0) if pooling == "mean" else states[own][-1]
                texts[role].append(vector / vector.norm())
        anchors, candidates = torch.stack(texts[0]), torch.stack(texts[1] + texts[2])
        return -(anchors @ candidates.T / 0.05).log_softmax(1).diagonal().mean()

    return loss


def source_and_target(number: int) -> dict[str, Any]:
    return {"source": sentence(number, 4 + number % 7), "target": sentence(number + 1, 2 + number % 5)}


def without_positions(tensors: Tensors) -> dict[str, Any]:
    return {name: value for name, value in tensors.items() if name != "supervised"}


ENTITIES = ["O", "B-SHIP", "I-SHIP", "B-SKY"]
NAMES = ["calm", "odd", "wild"]
CLASSIFY, IMAGES = {"name": "sequence_classification"}, {"name": "image_classification"}
PAIRS = {"name": "seq2seq", "generate_rows": 0}
"""Without generation, in which transformers asks all ranks of the pool whether they are done."""
CASES: dict[str, Case] = {
    "t5": Case("t5", source_and_target, PAIRS, without_positions, divided_by=TOKENS),
    "bart, int8": Case(
        "bart", source_and_target, PAIRS, without_positions,
        {"quant": {"name": "int8", "double_quant": False, "llm_int8_threshold": 1e-6}}, divided_by=TOKENS,
    ),
    "marian, not quantized": Case(
        "marian", source_and_target, PAIRS, without_positions, {"quant": {"name": "none", "double_quant": False}},
        divided_by=TOKENS,
    ),
    "t5, heads apart": Case(
        "t5", source_and_target, PAIRS, without_positions,
        more={"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}, divided_by=TOKENS,
    ),
    "whisper": Case("whisper", None, PAIRS | {"language": "en"}, without_positions, more={"several": True}, divided_by=TOKENS),
    "whisper of English, int8": Case(
        "whisper", None, PAIRS, without_positions,
        {"quant": {"name": "int8", "double_quant": False, "llm_int8_threshold": 1e-6}}, divided_by=TOKENS,
    ),
    "llama, names": Case(
        "llama", lambda n: {"text": sentence(n, 5 + n % 9), "label": NAMES[n % 3]}, CLASSIFY,
        labelled,
    ),
    "bert, pairs and numbers": Case(
        "bert", lambda n: {"text": sentence(n, 4 + n % 5), "text_pair": sentence(n + 1, 3), "label": n % 4}, CLASSIFY,
        labelled,
    ),
    "gpt2, several labels": Case(
        "gpt2", lambda n: {"text": sentence(n, 5 + n % 9), "label": NAMES[: n % 3]}, CLASSIFY,
        lambda t: _with_labels(t, t["label"]), {"quant": {"name": "int8", "double_quant": False, "llm_int8_threshold": 1e-6}},
    ),
    "bert, words": Case(
        "bert", _labelled, {"name": "token_classification"}, divided_by=TOKENS),
    "llama, words": Case(
        "llama", lambda n: _labelled(n) | {"labels": [i % 4 for i in range(4 + n % 7)]},
        {"name": "token_classification"}, dict, {"quant": {"name": "int8", "double_quant": False, "llm_int8_threshold": 1e-6}},
        {"classifier_dropout": 0.0}, TOKENS,
    ),
    "bert, masked": Case(
        "bert", lambda n: {"text": sentence(n, 9 + n % 9)}, {"name": "masked_lm"}, without_positions,
        divided_by=TOKENS,
    ),
    "bert, masked words": Case(
        "bert", lambda n: {"text": sentence(n, 9 + n % 90)},
        {"name": "masked_lm", "whole_words": True, "mask_probability": 0.3}, without_positions,
        {"data": {"truncation": "split"}, "quant": {"name": "int8", "double_quant": False, "llm_int8_threshold": 1e-6}},
        divided_by=TOKENS,
    ),
    "bert, pairs": Case(
        "bert", lambda n: {k: v for k, v in _pair(n).items() if k != "negative"}, {"name": "embedding"},
        together=_against_all("mean"),
    ),
    "llama, pairs": Case(
        "llama", _pair, {"name": "embedding"}, groups={"quant": {"name": "none", "double_quant": False}},
        together=_against_all("last"),
    ),
    "bert, a number to predict": Case(
        "bert", lambda n: {"text": sentence(n, 5 + n % 9), "label": n / 7}, CLASSIFY,
        lambda t: _with_labels(t, t["label"]), {"quant": {"name": "none", "double_quant": False}},
    ),
    "vit": Case("vit", None, IMAGES, labelled),
    "dinov2, none quantized": Case(
        "dinov2", None, {**IMAGES, "augmentation": "crop"}, labelled,
        {"quant": {"name": "none", "double_quant": False}},
    ),
    "swin, int8": Case(
        "swin", None, {**IMAGES, "augmentation": "none"}, labelled,
        {"quant": {"name": "int8", "double_quant": False, "llm_int8_threshold": 1e-6}},
    ),
    "vit, a resized table": Case(
        "vit", None, {**IMAGES, "image_size": 48},
        lambda t: labelled(t) | {"interpolate_pos_encoding": True},
    ),
}  # fmt: skip
