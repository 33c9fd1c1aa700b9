"""Every causal language model of transformers, one line each: what our way gives beside upstream's own code."""

from __future__ import annotations

import random
import tempfile
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fsdp_qlora.adapters.names import trainable_parameters
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.shards import local_tensor, row_range
from fsdp_qlora.errors import FsdpQloraError, typed_line
from fsdp_qlora.model.cut import cut_config, shallow_config
from fsdp_qlora.run.build import load_model, open_model
from fsdp_qlora.run.check import check_model
from fsdp_qlora.run.decide import replace_attention
from tests import upstream, uses

MODEL_TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
DECODER: dict[str, Any] = {"is_decoder": True}
SETTINGS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("bert", "bert-generation", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert",
         "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl"), DECODER),
    "big_bird": DECODER | {"attention_type": "original_full"},
    "xmod": DECODER | {"default_language": "en_XX"},
    "reformer": DECODER | {"axial_pos_embds": False},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 0.5}},
    "qwen4_exp_text": {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 16,
                       "indexer_compress_ratio": 4},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 8, "moe_topk": 2},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"] * 10 + ["conv", "full_attention"]},
    "cohere_compass_text": {"rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")}},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22},
    "hyperclovax": {"logits_scaling": 8.0},
    "mpt": {"logit_scale": "inv_sqrt_d_model"},
    "olmoe": {"clip_qkv": 0.5},
    "olmo": {"clip_qkv": 0.5},
}  # fmt: skip
"""What a family's default config lacks for a causal model that runs, or a switch that is worth having on."""
REAL_LAYERS = ("blt",)
"""Families whose widths cannot be made small one by one: their real layers are compared."""
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, rope linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama, rope llama3": ("llama", {"rope_parameters": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32, "rope_theta": 1e4}}),
    "llama, rope yarn": ("llama", {"rope_parameters": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}}),
    "qwen3_moe, untied, biases": ("qwen3_moe", {"attention_bias": True}),
    "qwen3_moe, dense layers": ("qwen3_moe", {"mlp_only_layers": [0]}),
    "gemma3_text, capped": ("gemma3_text", {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}),
    "phi3, long factors": ("phi3", {"original_max_position_embeddings": 32, "rope_parameters": {
        "rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [4.0 + i / 8 for i in range(48)],
        "original_max_position_embeddings": 32, "rope_theta": 1e4}}),
    "llama, rope dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    "mistral, window": ("mistral", {"sliding_window": 16}),
    "qwen2, window": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
}  # fmt: skip
LENGTH, CUT_AT = 48, 20


def sample(count: int, seed: str) -> list[str]:
    """Return some model types, the same for the same seed."""
    return sorted(random.Random(seed).sample(MODEL_TYPES, count))


def small_config(model_type: str, **more: Any) -> PreTrainedConfig:
    """Return a config of the family that is small enough to train in an instant, or in a minute."""
    config = CONFIG_MAPPING[model_type](**{**SETTINGS.get(model_type, {}), **more})
    return shallow_config(config) if model_type in REAL_LAYERS else cut_config(config, LENGTH)


def outcome(ranks: Ranks, model_type: str, more: dict[str, Any], packed: bool, in_use: bool = False) -> dict[str, Any]:
    """Train a family on ``ranks`` as a run does and compare; every rank returns the same.

    ``kind`` is ``equal``, ``WRONG``, ``refused``, ``not small`` or ``TRACEBACK``. ``in_use`` an equal family also
    generates, is exported, trained in bf16 and planned; ``also`` lists what is not as upstream has it.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        try:
            upstream.write_everywhere(ranks, folder, small_config(model_type, **more))
        except Exception as error:
            return {"kind": "not small", "why": typed_line(error)}
        try:
            return _compared(ranks, folder, packed, in_use)
        except FsdpQloraError as error:
            return {"kind": "refused", "why": str(error).replace(scratch, "FOLDER"), "code": error.exit_code}
        except Exception as error:
            return {"kind": "TRACEBACK", "why": f"{typed_line(error)} {traceback.format_exc()[-1200:]}"}


def _settings(folder: Path, packed: bool) -> RunConfig:
    config = RunConfig()
    return replace(
        config,
        model=replace(config.model, name=str(folder)),
        lora=replace(config.lora, r=4, alpha=8.0),
        precision=replace(config.precision, name="fp32"),
        data=replace(config.data, max_length=LENGTH, packing=packed),
        train=replace(config.train, micro_batch_size=2),
        quant=replace(config.quant, allow_16bit=True),
    )


def _compared(ranks: Ranks, folder: Path, packed: bool, in_use: bool) -> dict[str, Any]:
    settings = _settings(folder, packed)
    verdict = check_model(settings, folder, ranks)
    opened = open_model(replace_attention(settings, verdict.attention), folder, ranks, None)
    model, _ = load_model(opened.compiled(False), ranks)
    values = {}
    with torch.no_grad():
        for number, (name, parameter) in enumerate(trainable_parameters(model)):
            values[name] = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.05
            rows = slice(*row_range(parameter.shape[0], ranks.shard_rank, ranks.shard_size))
            local_tensor(parameter).copy_(values[name][rows])
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, min(upstream.vocab_of(folder), 100), (2, LENGTH), generator=generator)
    labels, positions = ids.clone(), None
    if packed:
        positions = torch.cat([torch.arange(CUT_AT), torch.arange(LENGTH - CUT_AT)])[None].repeat(2, 1)
        labels[:, [0, CUT_AT]] = -100
    trains = not is_random(folder)
    model.train(trains)
    loss = model(ids, labels, positions).sum()
    loss.backward()
    judge = uses.rounded(folder, torch.float32, opened.plan.quantized)
    judge = upstream.adapt(judge, list(opened.plan.targets), values, 4, 8)
    judge.train(trains)
    pieces = [ids[:, :CUT_AT], ids[:, CUT_AT:]] if packed else [ids]
    wanted = sum(upstream.loss_sum(judge, piece) for piece in pieces)
    assert isinstance(wanted, torch.Tensor)
    wanted.backward()
    theirs = {n.replace(".default.", "."): p for n, p in judge.named_parameters() if p.requires_grad}
    squares = torch.zeros(2, dtype=torch.float64)
    for name, parameter in trainable_parameters(model):
        full = torch.zeros_like(theirs[name]) if theirs[name].grad is None else theirs[name].grad
        rows = slice(*row_range(parameter.shape[0], ranks.shard_rank, ranks.shard_size))
        mine = local_tensor(parameter.grad) / ranks.size if parameter.grad is not None else torch.zeros_like(full[rows])
        squares += torch.stack([(mine - full[rows]).double().square().sum(), full[rows].double().square().sum()])
    torch.distributed.all_reduce(squares, group=ranks.group)
    gap, size = squares.sqrt().tolist()
    off = float(abs(loss.detach() - wanted.detach()) / wanted.detach())
    equal = off < 1e-5 and gap < 1e-4 * size
    tries = {
        "generate": lambda: uses.generation_differs(model, judge, ids),
        "export": lambda: uses.export_differs(model, opened, folder, ids, float(wanted.detach()), trains),
        "plan": lambda: uses.plan_differs(settings),
        "bf16": lambda: uses.bf16_differs(ranks, replace_attention(settings, verdict.attention), folder, ids),
    }
    return {
        "also": uses.problems(tries) if equal and in_use else [],
        "kind": "equal" if equal else "WRONG", "attention": verdict.attention, "loss": off,
        "gradients": gap / max(size, 1e-30), "why": "", "quantized": len(opened.plan.quantized),
        "adapted": len(opened.plan.targets),
    }  # fmt: skip


def is_random(folder: Path) -> bool:
    """Whether upstream itself draws random numbers in training mode, dropout or not (PhiMoE's router)."""
    return '"model_type": "phimoe"' in (folder / "config.json").read_text()
