"""Shrinks a model's config: every switch is kept, every size is reduced.

The twin check (in `checks`, at a run's start) compares our code with upstream's on a model of the run's own class and
settings. Keys that decide which code runs (layer types, biases, activations, rope types, scales, tying) are unchanged.
Keys that only decide how much there is (widths, heads, experts, vocabulary, layers, windows, positions) become so small
that rows of about 64 tokens cross every window and chunk, and a step takes milliseconds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig

HIDDEN, HEADS, HEAD_DIM = 64, 4, 16
VOCAB, EXPERTS, LAYERS, WINDOW, POSITIONS = 128, 8, 8, 16, 128
"""Sizes of a cut model: at most `LAYERS`, always `POSITIONS`, the others if the model has more."""

_HIDDEN = r"((pooler_)?hidden_size|n_embd|d_model|emb_dim|embedding_dim)$"
_LAYERS = r"(num_hidden_layers|n_layers?|num_layers|num_blocks|num_(de|en)coder_layers|(de|en)coder_layers)$"
_VOCAB = r".*vocab_size(_per_layer_input|_base)?$|vocab_size_per_layer_input$|.*hash_byte_group_vocab$"
_HEADS = r"(.*_)?(attention_heads|num_heads|n_heads?|n_heads)$"
_KV_HEADS = r"(.*_)?(key_value_heads|kv_heads|num_query_groups)$"
_HEAD_DIM = r"(swa_)?(head_dim|dim_head|kv_channels|attention_head_size|d_head|d_kv|v_head_dim|qk_nope_head_dim)$"
_ROPE_DIM = r"(qk_rope_head_dim|rotary_dim)$"
_EXPERTS = r"(num_experts|n_routed_experts|num_local_experts|moe_num_experts|zero_expert_num)$"
_TOP_K = r"(num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts)$"
_GROUPS = r"(n_group|num_expert_group)$"
_WINDOW = (
    r"(sliding_window(_size)?|attention_window_size|attention_chunk_size|window_size|local_attention|keep_window_size"
    r"|(mamba_)?chunk_size|index_topk|indexer_budget|index_block_size|local_attention_window_len|rel_extent|block_size"
    r"|floor_scale|log_scaling_n_floor)$"
)
_POSITIONS = r"(max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|max_(target|source)_positions)$"
_WIDTH = (
    r"(.*intermediate_size.*|.*ffn_dim|ffn_hidden_size|expert_ffn_hidden_size|dim_ff|dff|d_inner|ffn_dim|lru_width"
    r"|attention_hidden_size|embedding_size|(in|out)put_embedding_size|hidden_size_per_layer_input|(kv|q|o)_lora_rank"
    r"|router_hidden_size|feed_forward_size|word_embed_proj_dim|shared_expert.*_size|backbone_hidden_size"
    r"|ple_embed_dim|hc_lowrank|attention_head_dim|gated_norm_rank|adapter_rank|.*time_step_rank|mamba_dt_rank"
    r"|pronunciation_embed_dim|shape_embed_dim|mamba_d_ssm|laurel_rank|prompt_mid_dim)$"
)
_FIRST = r"(first_k_dense_replace|num_dense_layers|moe_layer_start_index)$"
_PERIOD = (
    r"(.*_layer_period|.*_every_n_layers|_?sliding_window_pattern|no_rope_layer_interval|decoder_sparse_step"
    r"|interleave_moe_layer_step|moe_layer_interval|layer_group_size|n_layers_per_attn_res_block)$"
)
_INDICES = r".*(layers?_(ids?|idxs?|indices|indexes)|attn_(idxs|ids|indices|indexes)|_layers)$"
_STATE = r"(mamba_d_state|ssm_state_size|state_size)$"
_INNER_DIM = r"(linear_((key|value)_)?head_dim|index(er)?_head_dim|mamba_d_head|mamba_head_?dim)$"
_INNER_HEADS = r"(linear_num_(key|value)_heads|linear_num_heads|index(er)?_n_heads|mamba_n_heads|mamba_num_heads)$"

_COUNTS = ((_VOCAB, VOCAB), (_EXPERTS, EXPERTS), (_TOP_K, 2), (_GROUPS, 2))
_CROSSED = ((_WINDOW, WINDOW), (_POSITIONS, POSITIONS))
_SIZES = (
    (_HIDDEN, HIDDEN), (_HEADS, HEADS), (_HEAD_DIM, HEAD_DIM), (_ROPE_DIM, HEAD_DIM // 2), (_WINDOW, WINDOW),
    (_STATE, 16), (_INNER_DIM, HEAD_DIM), (_INNER_HEADS, HEADS),
)  # fmt: skip
"""Counts of repeated parts, sizes that rows should exceed, and widths: a pattern of config keys, and the largest value
each keeps in a cut model."""


def cut_config(config: PreTrainedConfig, max_length: int = 0, num_layers: int = 0) -> PreTrainedConfig:
    """Return ``config`` with small sizes and one layer of each kind that its lists distinguish (or a whole period).

    Args:
        config: the config of any model.
        max_length: longest row of the run. If it exceeds the length that the model was trained for, the small model's
            rows exceed its own too: rotary embeddings may then use other factors.
        num_layers: the fewest layers to keep, up to `LAYERS` and the model's own number.

    Raises:
        ValueError: or whatever else upstream's config class raises if it rejects the small sizes.
    """
    values = _without_stages(config)
    _cut(values, max_length, num_layers)
    return type(config).from_dict(values)


def shallow_config(config: PreTrainedConfig, max_length: int = 0, num_layers: int = 0) -> PreTrainedConfig:
    """Return ``config`` with full-size layers, one of each kind, and few experts, tokens and positions.

    For classes whose widths depend on each other in ways that `cut_config` does not know. It takes the same arguments.

    Raises:
        ValueError: or whatever else upstream's config class raises if it rejects the values.
    """
    values = _without_stages(config)
    _cut_depth(values, max_length, num_layers)
    return type(config).from_dict(values)


def _without_stages(config: PreTrainedConfig) -> dict[str, Any]:
    """Return a config's values without the names of layers that an image model shows as a backbone (DINOv2, BEiT)."""
    return {key: v for key, v in config.to_dict().items() if key not in ("out_features", "out_indices", "stage_names")}


def _cut_depth(values: dict[str, Any], max_length: int, num_layers: int) -> None:
    """Cut counts, and sizes that rows should exceed, in ``values`` and in configs nested inside it, in place."""
    _prepare(values, lambda inside: _cut_depth(inside, max_length, num_layers))
    layers = _num_layers(values)
    kept = _kept_layers(values, layers, num_layers)
    trained = _trained_length(values, max_length)
    if apart := _apart(values):
        values["per_layer_config"] = {str(place): apart[old] for place, old in enumerate(kept) if old in apart}
    for key, value in list(values.items()):
        if isinstance(value, list):
            values[key] = _cut_list(key, value, layers, kept)
        elif _is_switch(key, value):
            values[key] = _cut_switch(key, value)
        elif isinstance(value, int) and not isinstance(value, bool) and value > 0:
            small = next((size for pattern, size in (*_COUNTS, *_CROSSED) if re.match(pattern, key)), value)
            values[key] = _cut_layers(key, min(value, small), layers, len(kept))
    _cut_trained_length(values, trained)


def _prepare(values: dict[str, Any], cut: Callable[[dict[str, Any]], None]) -> None:
    """Remove stored quantization from ``values`` and cut the configs nested inside it."""
    for key in ("quantization_config", "compression_config"):
        values.pop(key, None)
    for key, value in values.items():
        if isinstance(value, dict) and key.endswith(("_config", "encoder", "decoder")):
            cut(value)


def _num_layers(values: Mapping[str, Any]) -> int:
    """Return the number of layers; Nemotron-H has only a list of them."""
    counted = next((v for k, v in values.items() if re.match(_LAYERS, k) and isinstance(v, int)), 0)
    listed = values.get("layers_block_type")
    return counted or (len(listed) if isinstance(listed, list) else 0)


def _cut(values: dict[str, Any], max_length: int, num_layers: int) -> None:
    """Shrink the sizes in ``values`` and in configs nested inside it, in place; drop stored quantization."""
    _prepare(values, lambda inside: _cut(inside, max_length, num_layers))
    layers = _num_layers(values)
    kept = _kept_layers(values, layers, num_layers)
    trained = _trained_length(values, max_length)
    apart = _apart(values)
    values.pop("per_layer_config", None)
    hidden = next((v for k, v in values.items() if re.match(_HIDDEN, k) and isinstance(v, int)), 0)
    before = dict(values)
    for key, value in before.items():
        if isinstance(value, list):
            values[key] = _cut_list(key, value, layers, kept)
    for key in before:
        values[key] = _cut_value(key, values[key], before, hidden, layers, len(kept))
    _keep_products(values, before, hidden)
    _keep_sums(values, before)
    if apart:
        values["per_layer_config"] = {
            str(place): {k: _cut_apart(k, v, before, values) for k, v in apart[old].items()}
            for place, old in enumerate(kept)
            if old in apart
        }
        for layer in apart.values():  # the common head_dim may be a sum that uses a single layer's part
            if layer.get("qk_nope_head_dim", 0) + before.get("qk_rope_head_dim", 0) == before.get("head_dim"):
                small = _cut_apart("qk_nope_head_dim", layer["qk_nope_head_dim"], before, values)
                values["head_dim"] = small + values["qk_rope_head_dim"]
    _cut_trained_length(values, trained)
    _cut_rope(values)


def _trained_length(values: Mapping[str, Any], max_length: int) -> int:
    """Return the small model's ``original_max_position_embeddings``: its rows exceed it if and only if the run's do."""
    rope = values.get("rope_parameters") or {}
    trained = rope.get("original_max_position_embeddings") or values.get("original_max_position_embeddings")
    return WINDOW if isinstance(trained, int) and max_length > trained else POSITIONS // 2


def _cut_trained_length(values: dict[str, Any], trained: int) -> None:
    rope = values.get("rope_parameters")
    rope = rope if isinstance(rope, dict) else {}
    for part in (values, rope, *rope.values()):
        if isinstance(part, dict) and part.get("original_max_position_embeddings"):
            part["original_max_position_embeddings"] = trained


def _kept_layers(values: Mapping[str, Any], layers: int, num_layers: int) -> list[int]:
    """Return the layers to keep: the first of each kind that the lists distinguish, and a whole period."""
    lists = [v for v in values.values() if isinstance(v, list) and layers and len(v) == layers]
    lists += [[i in v for i in range(layers)] for k, v in values.items() if _names_layers(k, v, layers)]
    if apart := _apart(values):
        lists.append([sorted(apart.get(i, {}).items()) for i in range(layers)])
    needed = min(layers, LAYERS, max(2, num_layers, _dense_first(values) + 1, *_periods(values)))
    if not lists:
        return list(range(needed))
    kinds = [repr([each[i] for each in lists]) for i in range(layers)]
    first = sorted({kind: i for i, kind in reversed(list(enumerate(kinds)))}.values())[:LAYERS]
    rest = [i for i in range(layers) if i not in first]
    return sorted(first + rest[: max(0, needed - len(first))])


def _names_layers(key: str, value: Any, layers: int) -> bool:
    """Whether ``value`` lists layer indices, like ``mlp_only_layers``, ``full_attn_idxs``, ``attn_layer_indices``."""
    if not re.match(_INDICES, key) or not isinstance(value, list) or not value:
        return False
    whole = all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    return whole and value == sorted(set(value)) and value[0] >= 0 and value[-1] < layers


def _cut_list(key: str, value: list[Any], layers: int, kept: Sequence[int]) -> list[Any]:
    """Return a list reduced to the ``kept`` layers, if it is a list about layers; else the list itself."""
    if _names_layers(key, value, layers):
        return [place for place, old in enumerate(kept) if old in value]
    return [value[i] for i in kept] if layers and len(value) == layers else value


def _periods(values: Mapping[str, Any]) -> list[int]:
    """Return the periods after which a kind of layer repeats, from the settings that define one."""
    said = [v for k, v in values.items() if re.match(_PERIOD, k) and isinstance(v, int) and not isinstance(v, bool)]
    return [*said, *(len(v) for k, v in values.items() if k == "block_types" and isinstance(v, list))]


def _dense_first(values: Mapping[str, Any]) -> int:
    """Return 1 if the first layers differ from the rest, in which case one of them is kept."""
    return max((min(1, v) for k, v in values.items() if re.match(_FIRST, k) and isinstance(v, int)), default=0)


def _cut_many(key: str, value: list[Any] | dict[str, Any], hidden: int) -> list[Any] | dict[str, Any]:
    """Return a list or dict of sizes with each shrunk; any other list or dict unchanged."""
    if isinstance(value, dict):
        return {kind: min(rate, WINDOW // 2) for kind, rate in value.items()} if key == "compress_rates" else value
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        return value
    if re.match(_WIDTH, key):
        return [_width(v, hidden) for v in value]
    for pattern, size in _COUNTS:
        if re.match(pattern, key):
            return [min(v, size) for v in value]
    if re.match(_HEADS + "|" + r".*_heads_per_layer$", key):
        return [HEADS * 2 if v == max(value) and v != min(value) else HEADS for v in value]
    return value


def _cut_value(key: str, value: Any, before: Mapping[str, Any], hidden: int, layers: int, kept: int) -> Any:  # noqa: PLR0911
    if _is_switch(key, value):
        return _cut_switch(key, value)
    if isinstance(value, list | dict):
        return _cut_many(key, value, hidden)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        return value
    if key == "linear_num_key_heads" and value < before.get("linear_num_value_heads", 0):
        return HEADS // 2  # several value heads per key head, as before
    for pattern, size in (*_COUNTS, *_SIZES):
        if re.match(pattern, key):
            return min(value, size)
    if re.match(_POSITIONS, key):
        return POSITIONS  # even if there are fewer: the twin's rows must fit
    if re.match(_KV_HEADS, key):
        heads = next((v for k, v in before.items() if re.match(_HEADS, k) and isinstance(v, int)), value)
        return min(value, HEADS if value >= heads else 2)
    if key in ("topk_group", "index_topk_blocks"):
        return 1
    if re.match(_WIDTH, key):
        return _width(value, hidden)
    return _cut_layers(key, value, layers, kept)


def _is_switch(key: str, value: Any) -> bool:
    """Whether ``key`` is no size: randomness (which a comparison must not have) or a token id."""
    random = isinstance(value, float) and any(part in key for part in ("dropout", "pdrop", "jitter"))
    return random or key.endswith(("_token_id", "_token_index"))


def _cut_switch(key: str, value: Any) -> Any:
    return 0.0 if isinstance(value, float) else _token(value)


def _cut_layers(key: str, value: int, layers: int, kept: int) -> int:
    """Adjust a number that counts or indexes layers to ``kept`` of ``layers``; return others unchanged."""
    if re.match(_LAYERS, key):
        return kept if value == layers else min(value, kept)
    if re.match(_FIRST, key):
        return 1
    if key == "max_window_layers":
        return min(value, kept if value >= layers else max(1, kept // 2))
    if key == "num_kv_shared_layers":
        return min(value, kept - 1 if layers <= value else round(value * kept / layers))
    return value


def _width(value: int, hidden: int) -> int:
    """Scale a width with the hidden size, rounded to a multiple of 16."""
    return min(value, max(1, round(value * HIDDEN / max(1, hidden) / 16)) * 16)


def _token(value: Any) -> Any:
    """Map token ids into the small vocabulary; distinct ids stay distinct where possible."""
    if isinstance(value, list):
        return [_token(v) for v in value]
    return value % VOCAB if isinstance(value, int) and value >= VOCAB else value


def _apart(values: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Return the settings in which single layers differ from the rest, by layer index."""
    return {int(index): settings for index, settings in (values.get("per_layer_config") or {}).items()}


def _cut_apart(key: str, value: Any, before: Mapping[str, Any], small: Mapping[str, Any]) -> Any:
    """Shrink one layer's own size: still larger or smaller than the others', but by a factor of two."""
    if not isinstance(value, int) or not isinstance(small.get(key), int) or value == before[key]:
        return small.get(key, value)
    return small[key] * 2 if value > before[key] else max(1, small[key] // 2)


def _keep_products(values: dict[str, Any], before: Mapping[str, Any], hidden: int) -> None:
    """If heads x head size equalled a width before (Mamba's inner width), make it equal again."""
    expand = next((before[k] for k in ("mamba_expand", "expand") if isinstance(before.get(k), int)), 1)
    for heads_key, dim_key in _head_pairs(before):
        product = before[heads_key] * before[dim_key]
        for width, small in (
            (before.get("mamba_d_ssm"), values.get("mamba_d_ssm")),
            (expand * hidden, expand * HIDDEN),
        ):
            if width and small and product == width:
                values[heads_key] = max(1, small // values[dim_key])
                break


def _keep_sums(values: dict[str, Any], before: Mapping[str, Any]) -> None:
    """If a head's size equalled that of its rotated part, or the sum of both parts, make it equal again."""
    rope, nope = (before.get(key) for key in ("qk_rope_head_dim", "qk_nope_head_dim"))
    if rope is None:
        return
    for key in ("head_dim", "qk_head_dim"):
        if before.get(key) == rope:
            values[key] = values["qk_rope_head_dim"]
        elif nope is not None and before.get(key) == rope + nope:
            values[key] = values["qk_rope_head_dim"] + values["qk_nope_head_dim"]


def _head_pairs(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for heads, dim in (
        ("mamba_n_heads", "mamba_d_head"), ("mamba_num_heads", "mamba_head_dim"), ("num_heads", "head_dim"),
        ("n_mamba_heads", "mamba_headdim"),
    ):  # fmt: skip
        if isinstance(values.get(heads), int) and isinstance(values.get(dim), int):
            yield heads, dim


def _cut_rope(values: dict[str, Any]) -> None:
    """Shrink the values in the rope settings that depend on the head size."""
    rope = values.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    parts = [v for v in rope.values() if isinstance(v, dict)] or [rope]
    for part in parts:
        size = values.get("qk_rope_head_dim") or values.get("head_dim") or HEAD_DIM
        half = int(size * (part.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1.0)) // 2
        for key in ("short_factor", "long_factor"):
            if isinstance(part.get(key), Sequence):
                part[key] = list(part[key])[:half]
        if isinstance(part.get("mrope_section"), list):
            sections = part["mrope_section"]
            small = [max(1, x * half // sum(sections)) for x in sections]
            part["mrope_section"] = [half - sum(small[1:]), *small[1:]]
