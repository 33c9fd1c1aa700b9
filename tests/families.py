"""A tiny random model of each family, and the same training by transformers, bitsandbytes and PEFT, unsharded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BitsAndBytesConfig,
)

from fsdp_qlora.adapters.lora import initialize_adapters
from fsdp_qlora.data.loader import Batch
from tests import tiny
from tests.upstream import rounded_to_nf4

SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
}  # fmt: skip
MOE: dict[str, Any] = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SMALL | {"tie_word_embeddings": False},
    "mistral": SMALL | {"tie_word_embeddings": False},
    "qwen2": SMALL | {"tie_word_embeddings": True},
    "qwen3": SMALL | {"tie_word_embeddings": True},
    "gemma2": SMALL | {"query_pre_attn_scalar": 16, "sliding_window": 32, "final_logit_softcapping": 30.0},
    "gemma3_text": SMALL | {"query_pre_attn_scalar": 16, "sliding_window": 32},
    "phi": SMALL | {"num_key_value_heads": 4},
    "phi3": SMALL | {"pad_token_id": 0},
    "gpt2": {
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
    },
    "gpt_neox": SMALL,
    "mixtral": SMALL | MOE,
    "qwen3_moe": SMALL | MOE | {"decoder_sparse_step": 1, "norm_topk_prob": True},
}
"""Model type -> settings of a model of two layers; the same settings mean what they mean in each."""
SIDES: dict[str, Any] = {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_position_embeddings": 256, "dropout": 0.0, "pad_token_id": 0,
}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "bart": SIDES | {"decoder_start_token_id": 2, "forced_eos_token_id": 2},
    "marian": SIDES | {"decoder_start_token_id": 0, "forced_eos_token_id": None, "scale_embedding": True},
    "t5": {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0,
           "dropout_rate": 0.0},
    "bert": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "max_position_embeddings": 256, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
             "architectures": ["BertForMaskedLM"]},
}  # fmt: skip
"""Encoder-decoders and encoders; an objective of their own trains them."""
AUTO: dict[str, Any] = {
    "t5": AutoModelForSeq2SeqLM, "bart": AutoModelForSeq2SeqLM, "marian": AutoModelForSeq2SeqLM,
    "bert": AutoModelForMaskedLM,
}  # fmt: skip


def write_family(folder: Path, family: str, **more: Any) -> Path:
    """Write a tiny model of ``family`` with random bf16 weights, and its tokenizer; ``more`` replaces settings."""
    vocab = tiny.make_tokenizer(folder)
    settings = {"vocab_size": vocab, "bos_token_id": 1, "eos_token_id": 2, **(FAMILIES | OTHERS)[family], **more}
    config = AutoConfig.for_model(family, **settings)
    torch.manual_seed(0)
    model = AUTO.get(family, AutoModelForCausalLM).from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():  # larger than the usual 0.02, so that every part of the model matters
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.08)
    for name, buffer in model.named_buffers():
        if name == "final_logits_bias":  # zeros would hide that it is added
            nn.init.normal_(buffer)
    model.save_pretrained(folder)
    return folder


def keep_as_packed(model: nn.Module) -> None:
    """Keep bitsandbytes' layers from repacking their weights in bfloat16 as they evaluate on a CPU.

    Float32 would be lost, and so would be all later gradients.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


NF4 = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
)


def reference(
    folder: Path, targets: list[str], r: int, alpha: float, seed: int = 0, quant: BitsAndBytesConfig = NF4
) -> nn.Module:
    """Return transformers' quantized model with PEFT's adapters, initialised as ours are.

    bitsandbytes leaves stacked expert weights in 16 bit: they are passed through its quantization, one by one. Its int8
    layers multiply dequantized weights while they train on a CPU: `reference_losses` keeps them from that.
    """
    family = AutoConfig.from_pretrained(folder).model_type
    base = AUTO.get(family, AutoModelForCausalLM).from_pretrained(
        folder, quantization_config=quant, dtype=torch.bfloat16, attn_implementation="eager"
    )
    keep_as_packed(base)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if name.endswith(("gate_up_proj", "down_proj")) and parameter.dim() == 3:
                for expert in parameter:
                    expert.copy_(rounded_to_nf4(expert))
    base.requires_grad_(False)
    config = LoraConfig(
        task_type=None if family in AUTO else "CAUSAL_LM", r=r, lora_alpha=alpha, target_modules=targets,  # type: ignore[arg-type]
        fan_in_fan_out=False,
    )  # fmt: skip
    model = get_peft_model(base, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    initialize_adapters(model, seed)
    return model


def reference_losses(model: nn.Module, batches: Iterator[Batch], lr: float) -> list[float]:
    """Train with AdamW at a constant rate; return the loss of each batch (sum over targets / their number)."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    found = []
    model.train()
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear8bitLt):
            module.eval()
    for batch in batches:
        total = 0.0
        for m in batch.micro_batches:
            logits = model(input_ids=m.input_ids, use_cache=False).logits.float()
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), m.labels[:, 1:].flatten(), reduction="sum")
            (loss / batch.weights["tokens"]).backward()
            total += float(loss.detach())
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(total / batch.weights["tokens"])
    return found


def adapter_targets(folder: Path) -> list[str]:
    """Return what a run's adapter was put on."""
    return json.loads((folder / "adapter_config.json").read_text())["target_modules"]
