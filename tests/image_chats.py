"""Tiny random models that read images among tokens, and conversations with images made on the spot."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPImageProcessorPil,
    LlavaProcessor,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    SiglipImageProcessorPil,
)

from fsdp_qlora.adapters.experts import peft_config
from fsdp_qlora.adapters.names import trainable_parameters
from fsdp_qlora.checks import reference
from fsdp_qlora.data.loader import Cut, Loader
from fsdp_qlora.distributed.mesh import Ranks
from tests.build import build, whole
from tests.images import picture
from tests.objectives import upstream_model
from tests.tiny import make_tokenizer, sentence

_TOKENS = ["<image>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
LLAVA_TEMPLATE = (  # as that of llava-hf/llava-1.5-7b-hf: images first, and only parts are read
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_TEMPLATE = (  # as that of Qwen/Qwen2-VL-2B-Instruct: texts or parts, in their order
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_TEXT: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 2, "eos_token_id": 2, "bos_token_id": 1,
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_BLOCKS: dict[str, Any] = {"depth": 2, "num_heads": 4, "patch_size": 4, "in_channels": 3}
VISION: dict[str, dict[str, Any]] = {
    "llava": {
        "vision_config": {"model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 128,
                          "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32, "patch_size": 8},
        "text_config": _TEXT | {"model_type": "llama"},
    },
    "llava, siglip": {
        "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 64, "intermediate_size": 128,
                          "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32, "patch_size": 8},
        "text_config": _TEXT | {"model_type": "llama"}, "vision_feature_select_strategy": "full",
    },
    "qwen2_vl": {
        "vision_config": _BLOCKS | {"embed_dim": 64, "hidden_size": 64, "mlp_ratio": 2},
        "text_config": _TEXT | {"rope_parameters": _ROPE},
    },
    "qwen2_5_vl": {
        "vision_config": _BLOCKS | {"hidden_size": 64, "out_hidden_size": 64, "intermediate_size": 128,
                                    "window_size": 16, "fullatt_block_indexes": [1]},
        "text_config": _TEXT | {"rope_parameters": _ROPE},
    },
    "qwen3_vl": {
        "vision_config": _BLOCKS | {"hidden_size": 64, "out_hidden_size": 64, "intermediate_size": 128,
                                    "num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
        "text_config": _TEXT | {"head_dim": 16, "rope_parameters": _ROPE},
    },
}  # fmt: skip
"""Model type, and what else tells two of one type apart -> settings of a tiny model."""


def write_image_chat_model(folder: Path, family: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a tiny model with random weights, its tokenizer with tokens for images, and its image processor."""
    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(str(folder))
    tokenizer.add_special_tokens({"additional_special_tokens": _TOKENS})
    tokenizer.chat_template = LLAVA_TEMPLATE if _is_llava(family) else QWEN_TEMPLATE
    tokenizer.save_pretrained(str(folder))
    ids = dict(zip(_TOKENS, tokenizer.convert_tokens_to_ids(_TOKENS), strict=True))
    settings = {**VISION[family]}
    settings["text_config"] = {**settings["text_config"], "vocab_size": len(tokenizer)}
    if _is_llava(family):
        settings["image_token_index"] = ids["<image>"]
        square = {"height": 32, "width": 32}
        processor: Any = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=square)
        if "siglip" in family:
            processor = SiglipImageProcessorPil(size=square)
    else:
        names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
        settings |= {f"{key}_token_id": ids[f"<|{name}|>"] for key, name in names.items()}
        size = {"shortest_edge": 16 * 16, "longest_edge": 40 * 40}
        processor = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, size=size)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(
        AutoConfig.for_model(family.partition(",")[0], **settings), dtype=torch.float32
    )
    with torch.no_grad():
        for parameter in model.parameters():  # larger than the usual 0.02, so that every part of the model matters
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.08)
    model.to(dtype).save_pretrained(folder)
    processor.save_pretrained(str(folder))
    return folder


def _is_llava(family: str) -> bool:
    return family.partition(",")[0] == "llava"


def conversation(number: int, images: int) -> dict[str, Any]:
    """Return a row: a question about some images, its answer, and every third time another turn."""
    parts: list[dict[str, Any]] = []
    for image in range(images):
        parts += [{"type": "image", "path": f"images/{(number + image) % 8}.png"}]
        parts += [{"type": "text", "text": sentence(number + image, 2)}]
    asked: Any = [*parts, {"type": "text", "text": sentence(number, 3 + number % 4)}] if parts else sentence(number, 5)
    answered = [{"type": "text", "text": sentence(number + 1, 3 + number % 5)}]
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    if number % 3 == 0:
        turns += [
            {"role": "user", "content": sentence(number + 2, 3)},
            {"role": "assistant", "content": sentence(number + 3, 4)},
        ]
    return {"messages": turns}


def write_conversations(folder: Path, count: int = 24) -> Path:
    """Write rows with two images, one and none, and the images; return the file of rows."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number in range(8):
        picture(number, 24 + 5 * (number % 4), 20 + 6 * (number % 3)).save(folder / f"images/{number}.png")
    file = folder / "rows.jsonl"
    rows = (conversation(number, (2, 1, 0)[number % 3]) for number in range(count))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def chat_case(folder: Path, family: str, **groups: Any) -> tuple[str, dict[str, Any]]:
    """Write a model and conversations; return the model's folder and the settings of a run."""
    model = write_image_chat_model(folder / "base", family)
    settings: dict[str, Any] = {
        "data": {"train": str(write_conversations(folder / "data")), "max_length": 256},
        "precision": {"name": "fp32"},
        "schedule": {"name": "constant", "warmup_ratio": 0.0},
        "train": {"max_steps": 6},
    }
    for name, values in groups.items():
        settings[name] = {**settings.get(name, {}), **values}
    return str(model), settings


def upstream_row(folder: Path, family: str, row: dict[str, Any], images: Path) -> dict[str, torch.Tensor]:
    """Return a conversation as stock code reads it, alone: the model's inputs, and labels of the assistant's turns."""
    tokenizer: Any = AutoTokenizer.from_pretrained(str(folder))
    processor: Any = AutoImageProcessor.from_pretrained(str(folder), backend="pil")
    turns = [
        turn if not _is_llava(family) or isinstance(turn["content"], list)
        else {**turn, "content": [{"type": "text", "text": turn["content"]}]}
        for turn in row["messages"]
    ]  # fmt: skip
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    paths = [part["path"] for turn in turns for part in turn["content"] if isinstance(part, dict) and "path" in part]
    pictures = [Image.open(images / path).convert("RGB") for path in paths]
    made: dict[str, Any] = dict(processor(images=pictures, return_tensors="pt")) if pictures else {}
    token = "<image>" if _is_llava(family) else "<|image_pad|>"
    for number in range(len(pictures)):
        text = text.replace(token, _repeated(family, processor, tokenizer, made, number).replace(token, "<|>"), 1)
    text = text.replace("<|>", token)
    read = tokenizer(text, return_offsets_mapping=True, return_tensors="pt")
    ids = read["input_ids"]
    spans = [match.span(1) for match in re.finditer(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", text, re.DOTALL)]
    learned = torch.tensor([[any(a <= start < b for a, b in spans) for start, _ in read["offset_mapping"][0].tolist()]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.where(learned, ids, -100),
        **made,
    }
    if not _is_llava(family) and pictures:
        inputs["mm_token_type_ids"] = (ids == tokenizer.convert_tokens_to_ids(token)).int()
    return inputs


def _repeated(family: str, processor: Any, tokenizer: Any, made: dict[str, Any], number: int) -> str:
    """Return an image's tokens by upstream's own processor; that of Qwen2-VL cannot be made without torchvision."""
    if _is_llava(family):
        full = "siglip" in family
        strategy = {
            "vision_feature_select_strategy": "full" if full else "default", "num_additional_image_tokens": int(not full)
        }  # fmt: skip
        return LlavaProcessor(processor, tokenizer, patch_size=8, **strategy).replace_image_token(made, number)
    of_processor: Any = SimpleNamespace(image_processor=processor, image_token="<|image_pad|>")
    return Qwen2VLProcessor.replace_image_token(of_processor, made, number)


def upstream_losses(ranks: Ranks, folder: str, groups: dict[str, Any], family: str) -> tuple[list[float], float]:
    """Train as plain transformers and PEFT do, each row alone; return each step's loss, and the held-out one after it.

    The first values of the adapters and the order of the rows are ours.
    """
    prepared = build(ranks, folder, **groups)
    data, train, settings = prepared.data, prepared.config.train, prepared.config.optim
    assert data is not None and data.train is not None
    loader = Loader(data.encoder.rows(data.train), train.global_batch_size, Cut(1, 0, 1), prepared.config.run.seed)
    values = {name: whole(parameter).detach().clone() for name, parameter in trainable_parameters(prepared.model)}
    config = peft_config(prepared.plan.targets, [], prepared.settings.lora, "CAUSAL_LM")
    adapted = reference.adapt(upstream_model(prepared), config, values).train()  # type: ignore[arg-type]
    file = Path(groups["data"]["train"])
    rows = [upstream_row(Path(folder), family, json.loads(line), file.parent) for line in file.read_text().splitlines()]
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps, weight_decay=0.0
    )
    losses = []
    for step in range(train.max_steps):
        chosen = [rows[n] for n in loader.indices(step * train.global_batch_size, train.global_batch_size)]
        total = sum(_targets(row) for row in chosen)
        losses.append(0.0)
        for row in chosen:
            loss = adapted(**row).loss * _targets(row) / total
            loss.backward()
            losses[-1] += float(loss.detach())
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    prepared.close()
    return losses, mean_loss(adapted.eval(), rows)


@torch.no_grad()
def mean_loss(model: nn.Module, rows: list[dict[str, torch.Tensor]]) -> float:
    """Return the mean loss of all supervised tokens, each row alone."""
    return sum(float(model(**row).loss) * _targets(row) for row in rows) / sum(_targets(row) for row in rows)


def _targets(row: dict[str, torch.Tensor]) -> int:
    return int((row["labels"][:, 1:] != -100).sum())
