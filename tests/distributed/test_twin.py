"""The twin check finds what would train silently wrong, names it, and remembers what was equal."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fsdp_qlora.adapters.experts import StackedLora
from fsdp_qlora.adapters.linear import QuantLoraLinear
from fsdp_qlora.attention.candidates import attention_candidates
from fsdp_qlora.checks import reference
from fsdp_qlora.checks.reference import Computed
from fsdp_qlora.checks.task_twin import TaskTwin
from fsdp_qlora.checks.twin import check_twin
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.reduce import barrier
from fsdp_qlora.distributed.shards import local_tensor
from fsdp_qlora.errors import FsdpQloraError
from fsdp_qlora.load.safetensors import weight_files
from fsdp_qlora.model import skeleton
from fsdp_qlora.model.families import decoder_layers
from fsdp_qlora.model.root import CausalModel
from fsdp_qlora.quant.matrices import QuantMatrices
from fsdp_qlora.run import check as building
from fsdp_qlora.run.build import load_model, open_model
from fsdp_qlora.run.check import check_losses, check_model
from fsdp_qlora.run.decide import replace_attention
from tests import upstream
from tests.build import build, config_of
from tests.families import write_family
from tests.matrix import small_config


def _buffers(model: CausalModel, ending: str) -> list[torch.Tensor]:
    return [buffer for name, buffer in model.base.named_buffers() if name.endswith(ending)]


def lost_buffer(model: CausalModel, ranks: Ranks) -> None:
    for buffer in _buffers(model, "e_score_correction_bias"):
        buffer.zero_()


def buffer_that_differs_on_one_rank(model: CausalModel, ranks: Ranks) -> None:
    for buffer in _buffers(model, "e_score_correction_bias"):
        buffer.add_(torch.linspace(0, ranks.rank, buffer.numel()))


def swapped_rotary_table(model: CausalModel, ranks: Ranks) -> None:
    for buffer in _buffers(model, "rotary_emb.inv_freq"):
        buffer.copy_(buffer.flip(0))


def missing_causal_mask(model: CausalModel, ranks: Ranks) -> None:
    for module in model.base.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False


def attention_bias_ignored(model: CausalModel, ranks: Ranks) -> None:
    def flat(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "alibi": torch.zeros_like(kwargs["alibi"])}

    for layer in decoder_layers(model.base):
        layer.register_forward_pre_hook(flat, with_kwargs=True)


def logit_scale_ignored(model: CausalModel, ranks: Ranks) -> None:
    model.base.get_output_embeddings().logit_scale = 1.0


def second_sequence_sees_itself(model: CausalModel, ranks: Ranks) -> None:
    def unpack(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if kwargs.get("position_ids") is None:
            return args, kwargs
        positions = kwargs["position_ids"].clone()
        positions[1] = torch.arange(positions.shape[1])
        return args, {**kwargs, "position_ids": positions}

    model.base.get_decoder().register_forward_pre_hook(unpack, with_kwargs=True)


def adapter_without_scaling(model: CausalModel, ranks: Ranks) -> None:
    for module in model.modules():
        if isinstance(module, QuantLoraLinear):
            module.scaling["default"] = 1.0


def experts_adapter_without_scaling(model: CausalModel, ranks: Ranks) -> None:
    for module in model.modules():
        if isinstance(module, StackedLora):
            module.scaling["default"] = 1.0


def one_layer_of_another_kind(model: CausalModel, ranks: Ranks) -> None:
    types = model.base.config.layer_types
    types[types.index("sliding_attention")] = "full_attention"


def gate_and_up_exchanged(model: CausalModel, ranks: Ranks) -> None:
    mlp = model.base.get_submodule("model.layers.1.mlp")
    mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj


def two_experts_exchanged(model: CausalModel, ranks: Ranks) -> None:
    matrices = next(m for m in model.modules() if isinstance(m, QuantMatrices) and m.count > 1)
    rows = matrices.rows_each
    order = torch.arange(matrices.count * rows).view(matrices.count, rows)[[1, 0, *range(2, matrices.count)]].flatten()
    with torch.no_grad():
        for parameter in (matrices.packed, matrices.absmax, matrices.nested):
            local = local_tensor(parameter)  # on one rank: all rows
            local.copy_(local[order].clone())
        matrices.offset.copy_(matrices.offset[[1, 0, *range(2, matrices.count)]].clone())


def recomputed_layer_differs(model: CausalModel, ranks: Ranks) -> None:
    calls = {"training": 0}

    def drift(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        calls["training"] += torch.is_grad_enabled()
        return output * 1.05 if calls["training"] > 1 and torch.is_grad_enabled() else None

    model.base.get_submodule("model.layers.0.mlp.act_fn").register_forward_hook(drift)


def gradients_of_bf16_drift(model: CausalModel, ranks: Ranks) -> None:
    def drift(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * 1.5)

    if model.base.dtype == torch.bfloat16:
        model.base.get_submodule("model.layers.1.self_attn.o_proj").register_forward_hook(drift)


FAULTS: dict[str, tuple[Any, str, dict[str, Any], str]] = {
    "lost buffer": (lost_buffer, "deepseek_v3", {}, "loss"),
    "swapped rotary table": (swapped_rotary_table, "llama", {}, "rotary_emb|self_attn"),
    "missing causal mask": (missing_causal_mask, "llama", {}, "later ones"),
    "attention bias ignored": (attention_bias_ignored, "bloom", {}, "loss"),
    "logit scale ignored": (logit_scale_ignored, "granite", {}, "loss"),
    "second sequence sees itself": (second_sequence_sees_itself, "llama", {"packed": True}, "loss"),
    "adapter without scaling": (adapter_without_scaling, "llama", {}, "loss"),
    "one layer of another kind": (one_layer_of_another_kind, "gemma3_text", {}, "layers|rotary_emb"),
    "gate and up exchanged": (gate_and_up_exchanged, "llama", {}, "layers.1.mlp"),
    "two experts exchanged": (two_experts_exchanged, "mixtral", {}, "experts"),
    "experts' adapter without scaling": (experts_adapter_without_scaling, "mixtral", {"experts": "experts"}, "experts"),
    "gradients of bf16 drift": (gradients_of_bf16_drift, "ernie4_5_moe", {}, "gradients are .* upstream's in bf16"),
    "adapter with dropout": (adapter_without_scaling, "llama", {"dropout": 0.1}, "loss"),
    "recomputed layer differs": (recomputed_layer_differs, "llama", {"full": True}, "gradients"),
}
"""Name -> what plants it in our model, the family, how it is run, what the message must name."""


def _settings(
    packed: bool = False, full: bool = False, check: str = "always", folder: str = "", dropout: float = 0.0,
    overrides: dict[str, str] | None = None, experts: str = "", add_tokens: tuple[str, ...] = (),
) -> RunConfig:  # fmt: skip
    config = RunConfig()
    return replace(
        config,
        model=replace(config.model, check=check, name=folder, add_tokens=list(add_tokens)),
        data=replace(config.data, packing=packed, max_length=64),
        lora=replace(config.lora, r=4, alpha=8.0, dropout=dropout, target_parameters=experts),
        quant=replace(config.quant, overrides=overrides or {}),
        train=replace(
            config.train, micro_batch_size=2, activation_checkpointing="full" if full else "none"
        ),
    )  # fmt: skip


def try_twin(ranks: Ranks, model_type: str, fault: str | None, how: dict[str, Any]) -> str:
    """Check a family with a fault planted in our model; return the message, empty where nothing was found."""
    config = _settings(**how)
    change = buffer_that_differs_on_one_rank if fault == "one rank" else FAULTS[fault][0] if fault else None

    def build(settings: RunConfig, folder: Path):
        opened = open_model(settings, folder, ranks, None)
        model, _ = load_model(opened.compiled(False), ranks)
        if change is not None:
            change(model, ranks)
        return model, opened

    small = small_config(model_type)
    candidates = attention_candidates(ranks.device, None, small, torch.float32)[:1]
    try:
        check_twin(config, small, None, candidates, ranks, build)
    except FsdpQloraError as error:
        assert error.exit_code == 2
        return str(error)
    return ""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_and_named(pool, fault):
    _, model_type, how, named = FAULTS[fault]
    message = pool.run(1, try_twin, model_type, fault, how)[0]
    assert message.startswith("model.check:") and re.search(named, message), message
    assert "model.check=off" in message


def test_a_buffer_that_differs_on_one_rank_is_found(pool):
    messages = pool.run(2, try_twin, "deepseek_v3", "one rank", {})
    assert all(message.startswith("model.check:") for message in messages), messages


def export_to_other_names(ranks: Ranks) -> str:
    """Check a family of which PEFT misreads some names, which are adapted all the same; return the message."""
    original, skeleton.renamed_by_peft = skeleton.renamed_by_peft, lambda *_: frozenset()
    try:
        return try_twin(ranks, "laguna", None, {})
    finally:
        skeleton.renamed_by_peft = original


def test_an_adapter_that_plain_peft_would_not_load_is_found(pool):
    assert "plain PEFT would not load the exported adapter of base_model" in pool.run(1, export_to_other_names)[0]


MIXED = {"*.down_proj": "int8", "*.k_proj": "fp4", "*.q_proj": "none", "*.layers.7.*": "fp4"}


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize(
    "how",
    [{}, {"packed": True}, {"full": True}, {"dropout": 0.1}, {"overrides": MIXED}, {"experts": "experts"}],
    ids=["padded", "packed", "recomputed", "dropout", "mixed formats", "experts adapted"],
)
def test_nothing_is_found_where_nothing_is_wrong(pool, how, num_ranks):
    assert set(pool.run(num_ranks, try_twin, "qwen3_moe", None, how)) == {""}


def test_a_scale_that_begins_far_into_a_sequence_is_seen_in_packed_rows(pool):
    """Llama 4 scales queries by their place in the sequence, not in the row, from its floor_scale on."""
    assert "a token's loss is off" in pool.run(1, try_twin, "llama4_text", None, {"packed": True})[0]
    assert pool.run(1, try_twin, "llama4_text", None, {})[0] == ""


def other_attention_on_the_second_rank(ranks: Ranks, folder: str) -> str:
    """Check a model where the ranks have different libraries; return the message."""
    original = building.attentions_for
    building.attentions_for = lambda *_: ("blockwise", "eager") if ranks.is_main else ("eager",)
    try:
        check_model(_settings(folder=folder), Path(folder), ranks)
    except FsdpQloraError as error:
        return str(error)
    finally:
        building.attentions_for = original
    return ""


def test_ranks_that_would_take_other_attentions_are_told_so(pool, tmp_path):
    folder = upstream.write_random(tmp_path / "model", small_config("llama"))
    said = "rank 0 would use blockwise, eager, but rank 1 eager"
    assert all(said in message for message in pool.run(2, other_attention_on_the_second_rank, str(folder)))


def remembered(ranks: Ranks, folder: str, cache: str) -> list[Any]:
    """Check twice with a cache of its own; return how often our model was built, and the second time's seconds."""
    builds = []
    original, original_cache = building.load_model, building.cache_folder

    def counted(*args: Any, **kwargs: Any):
        builds.append(1)
        return original(*args, **kwargs)

    building.load_model, building.cache_folder = counted, lambda: Path(cache)
    try:
        check_model(_settings(check="auto", folder=folder), Path(folder), ranks)
        first = len(builds)
        started = time.perf_counter()
        verdict = check_model(_settings(check="auto", folder=folder), Path(folder), ranks)
        seconds = time.perf_counter() - started
        again = len(builds)
        check_model(_settings(check="always", folder=folder), Path(folder), ranks)
        check_model(_settings(packed=True, check="auto", folder=folder), Path(folder), ranks)
        return [first, again, len(builds), verdict.attention, seconds]
    finally:
        building.load_model, building.cache_folder = original, original_cache


def test_a_result_is_remembered_by_what_it_depends_on(pool, tmp_path):
    folder = upstream.write_random(tmp_path / "model", small_config("llama"))
    first, again, in_all, attention, seconds = pool.run(1, remembered, str(folder), str(tmp_path / "cache"))[0]
    assert (first, again, in_all) == (1, 1, 3)
    assert attention == "blockwise" and seconds < 2.0


def losses_compared(ranks: Ranks, folder: str, cache: str) -> list[int]:
    """Start several times with a cache of its own; return after each start how often losses were compared so far."""
    counts, compared = [], []
    original, original_cache = building.require_losses_agree, building.cache_folder

    def start(**settings: Any) -> None:
        config = replace_attention(_settings(folder=folder, **settings), "eager")
        opened = open_model(config, Path(folder), ranks, None, say=False)
        check_losses(opened, load_model(opened, ranks)[0], Path(folder), ranks)
        counts.append(len(compared))

    def counted(*args: Any) -> None:
        original(*args)
        compared.append(1)

    building.require_losses_agree, building.cache_folder = counted, lambda: Path(cache)
    try:
        start(check="auto")
        start(check="auto")
        start(check="always")
        start(check="auto", overrides={"*.q_proj": "none"})
        file = weight_files(Path(folder))[0]
        barrier(ranks)
        if ranks.is_main:  # other weights under the same names and shapes
            save_file({name: tensor * 1.5 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
        barrier(ranks)
        start(check="auto")
        start(check="auto")
        start(check="auto", add_tokens=("<|x|>",))
        return counts
    finally:
        building.require_losses_agree, building.cache_folder = original, original_cache


def test_losses_are_compared_once_for_the_same_weights_and_settings(pool, tmp_path):
    folder = upstream.write_random(tmp_path / "model", small_config("llama"))
    of_ranks = pool.run(2, losses_compared, str(folder), str(tmp_path / "cache"))
    assert of_ranks == [[1, 1, 2, 3, 4, 4, 5]] * 2


def peft_that_fails(ranks: Ranks) -> str:
    """Check with a PEFT that raises on the exported adapter; return the message, on every rank."""

    def fail(*_: Any) -> dict[str, torch.Tensor]:
        raise RuntimeError("size mismatch")

    original, reference.read_adapter = reference.read_adapter, fail
    try:
        return try_twin(ranks, "llama", None, {})
    finally:
        reference.read_adapter = original


def test_an_error_of_peft_on_the_first_rank_ends_all(pool):
    said = "plain PEFT would not load the exported adapter (RuntimeError"
    assert all(said in message for message in pool.run(2, peft_that_fails))


def too_long(ranks: Ranks, folder: str, rows: str, max_length: int) -> str:
    """Prepare a model with learned positions; return how it was refused."""
    try:
        build(ranks, folder, data={"train": rows, "max_length": max_length})
    except FsdpQloraError as error:
        return f"{error.exit_code} {error}"
    return ""


def test_rows_longer_than_learned_positions_end_before_the_first_step(pool, tmp_path, chat_rows):
    folder = write_family(tmp_path / "model", "gpt2", n_positions=24)
    said = (
        "2 data.max_length: rows have up to [0-9]+ tokens, but this model has only 24 learned positions.* "
        "Set data.max_length=24 or less"
    )
    assert all(re.match(said, x) for x in pool.run(2, too_long, str(folder), str(chat_rows), 512))
    assert pool.run(1, too_long, str(folder), str(chat_rows), 24) == [""]


REMOTE = """
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own_model"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 0.25
        return out
"""


TIED_WIDTHS = REMOTE.replace(
    "    def forward",
    """    def __init__(self, config):
        super().__init__(config)
        self.per_channel = nn.Parameter(torch.ones(config.channel_count))
        self.post_init()

    def forward""",
).replace(
    "self, *args, **kwargs):\n",
    "self, *args, **kwargs):\n        assert len(self.per_channel) == self.config.hidden_size\n",
)
"""The same with a width of its own name, which must be another's: it cannot be cut by the names of its config."""


def checked_remote(ranks: Ranks, folder: str) -> tuple[str, bool]:
    """Check a folder with code of its own; return the attention that is equal, and whether real layers were run."""
    config = _settings(folder=folder)
    config = replace(config, model=replace(config.model, trust_remote_code=True))
    verdict = check_model(config, Path(folder), ranks)
    return verdict.attention, verdict.layers_of is not None


@pytest.mark.parametrize("code", [REMOTE, TIED_WIDTHS], ids=["cut", "real layers"])
def test_a_folder_with_code_of_its_own_is_checked_too(pool, tmp_path, code):
    import json

    small = small_config("llama")
    small.hidden_size, small.num_hidden_layers = 96, 3
    folder = upstream.write_random(tmp_path / "own", small)
    (folder / "modeling_own.py").write_text(code)
    file = folder / "config.json"
    config = json.loads(file.read_text()) | {"model_type": "own_model", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    file.write_text(json.dumps(config | {"channel_count": 96}))
    if code == TIED_WIDTHS:
        tensors = load_file(folder / "model.safetensors") | {"per_channel": torch.ones(96)}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    found = pool.run(2, checked_remote, str(folder))
    assert set(found) == {("eager", code == TIED_WIDTHS)}


def _of_scores(ranks: Ranks, folder: str) -> list[str | None]:
    """Return what is said of scores whose mean is below zero: of the same, and of some that are 10 % off."""
    settings = config_of(folder, objective={"name": "masked_lm"})
    twin = TaskTwin(settings, Path(folder), ranks, lambda *_: pytest.fail("nothing is built"))
    theirs = Computed([torch.tensor([-1.0]), torch.tensor([0.5])], {})
    others = Computed([1.1 * score for score in theirs.losses], {})
    return [twin._losses_differ(mine, theirs) for mine in (theirs, others)]


def test_scores_whose_mean_is_below_zero_are_compared(pool, tiny_model):
    same, other = pool.run(1, _of_scores, str(tiny_model))[0]
    assert same is None and other is not None and "off by 1.3e-01" in other
