"""`model.add_tokens`: rows for new tokens equal stock PEFT's `trainable_token_indices`, and travel with the adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fsdp_qlora.adapters import build_method
from fsdp_qlora.adapters.names import trainable_parameters
from fsdp_qlora.adapters.replicated import ReplicatedGradients
from fsdp_qlora.checks import reference
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.shards import fill_slice, local_tensor
from fsdp_qlora.errors import FsdpQloraError
from fsdp_qlora.optim.optimizers import ShardedOptimizer
from fsdp_qlora.run.inference import load_for_inference
from fsdp_qlora.run.tokens import prepare_tokens
from fsdp_qlora.shapes.tokens import trained_indices
from tests import tiny
from tests.build import build, config_of, loaded_state, losses, run_fit, whole, world_of
from tests.tiers import some_in_full
from tests.tolerances import FP32_LOSSES

TOKENS = ["<|im_start|>", "<|im_end|>"]
GRADIENTS = 1e-4


def _model(folder: Path, tied: bool, spare: int, **settings: Any) -> Path:
    return tiny.make_base_model(folder / "base", spare, tie_word_embeddings=tied, **settings)


def _equals_peft(ranks: Ranks, folder: str, groups: dict) -> tuple[float, float]:
    """Return the largest relative differences of losses and gradients from stock PEFT on the same dense weights."""
    prepared = build(ranks, folder, model={"add_tokens": TOKENS}, precision={"name": "fp32"}, **groups)
    model, values = prepared.model.train(), {}
    for number, (name, parameter) in enumerate(trainable_parameters(model)):
        value = 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        with torch.no_grad():
            fill_slice(parameter, value, ranks.shard_rank, ranks.shard_size)
        values[name] = value
    size = len(prepared.tokenizer)
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, size, (24,), generator=draw) for _ in range(6)]  # as many on 1, 2 or 3 ranks
    for row in rows:
        row[torch.tensor([3, 9, 17])] = torch.tensor([size - 2, size - 1, size - 1])  # new tokens, read and predicted
    mine = {i: model(rows[i][None], rows[i][None]) for i in range(ranks.rank, len(rows), ranks.size)}
    sum(each.sum() for each in mine.values()).backward()
    ReplicatedGradients(trainable_parameters(model), ranks)()
    gradients = {name: whole(p.grad) for name, p in trainable_parameters(model)}

    dense = reference.load(Path(folder), torch.float32, torch.device("cpu"), False)
    reference.round_weights(dense, (*prepared.plan.quantized, *prepared.plan.quantized_edges))
    dense.resize_token_embeddings(size)
    config = build_method("lora").peft(prepared.plan.targets, prepared.config.lora, "CAUSAL_LM")
    config.trainable_token_indices = trained_indices(prepared.shapes, size - 2, 2)
    truth = reference.compute(reference.adapt(dense, config, values).train(), rows)
    assert gradients.keys() == truth.gradients.keys()
    gaps = [float((mine[i].detach() - truth.losses[i]).abs().max() / truth.losses[i].abs().max()) for i in mine]
    slopes = [float((g - truth.gradients[n]).norm() / truth.gradients[n].norm()) for n, g in gradients.items()]
    return max(gaps), max(slopes)


FORMATS = {
    "nf4": {},
    "quantized table": {"quant": {"embeddings": "int8"}},
    "4-bit table": {"quant": {"embeddings": "nf4"}},
    "none": {"quant": {"name": "none", "double_quant": False}},
    "replicated": {"fsdp": {"adapters": "replicated"}},
    "plain": {"debug": {"name": "plain"}},
}


@pytest.mark.parametrize("num_ranks", some_in_full([1, 2, 3], [2]))
@pytest.mark.parametrize("kind", some_in_full(FORMATS, ["nf4", "quantized table"]))
@pytest.mark.parametrize(("tied", "spare"), [(True, 0), (False, 64), (False, 1), (True, 64)])
def test_equals_stock_peft_on_a_dense_copy(pool, tmp_path, tied, spare, kind, num_ranks):
    for gap, slope in pool.run(num_ranks, _equals_peft, str(_model(tmp_path, tied, spare)), FORMATS[kind]):
        assert gap <= FP32_LOSSES
        assert slope <= GRADIENTS


def _starts(ranks: Ranks, folder: str) -> list[torch.Tensor]:
    prepared = build(ranks, folder, model={"add_tokens": TOKENS})
    return [p.detach().clone() for n, p in trainable_parameters(prepared.model) if n.endswith("tokens_delta")]


def test_rows_start_at_the_mean_of_the_tokens_with_the_same_bits_on_any_number_of_ranks(pool, tmp_path):
    folder = _model(tmp_path, False, 7)
    one, many = pool.run(1, _starts, str(folder))[0], pool.run(3, _starts, str(folder))
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for number, table in enumerate((dense.get_input_embeddings().weight, dense.get_output_embeddings().weight)):
        assert torch.allclose(one[number], table[:-7].mean(0).expand(2, -1), atol=1e-7)
        assert all(torch.equal(one[number], rows[number]) for rows in many)


def _rows(folder: Path) -> Path:
    """Write conversations that all end alike."""
    said = [{"role": "assistant", "content": "seven small ships"}]
    rows = [{"messages": [{"role": "user", "content": tiny.sentence(n, 2 + n % 6)}, *said]} for n in range(48)]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "chatml.jinja").write_text(tiny.CHAT_TEMPLATE)
    return file


def _settings(folder: Path, steps: int, tokens: list[str] = TOKENS) -> dict:
    return {
        "model": {"add_tokens": tokens},
        "data": {"train": str(_rows(folder)), "template": str(folder / "chatml.jinja")},
        "train": {"max_steps": steps, "global_batch_size": 8, "micro_batch_size": 4},
        "precision": {"name": "fp32"},
        "lora": {"r": 8, "alpha": 16},
        "optim": {"lr": 1e-2},
    }


def _answers(ranks: Ranks, folder: str, adapter: str) -> list[int]:
    """Return what we generate with the exported adapter."""
    config = config_of(folder, precision={"name": "fp32"}, quant={"name": "none", "double_quant": False})
    prepared = load_for_inference(config, Path(adapter), world_of(ranks))
    ids = prepared.tokenizer.apply_chat_template(
        [{"role": "user", "content": "lazy dog"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    eos = prepared.tokenizer.convert_tokens_to_ids(TOKENS[1])
    # all ranks stop at the same token; upstream would ask the pool's default group, with ranks that take no part
    out = prepared.model.generate(**ids, max_new_tokens=24, do_sample=False, eos_token_id=eos, synced_gpus=False)
    return out[0, ids["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize(("tied", "spare"), [(True, 0), (False, 64)])
def test_a_base_model_learns_to_stop_and_stops_in_plain_peft_too(pool, tmp_path, tied, spare, num_ranks):
    # with rows this large, frozen ones too can be told apart with certainty
    folder, settings = _model(tmp_path, tied, spare, initializer_range=0.1), _settings(tmp_path, 40)
    last = pool.run(num_ranks, run_fit, str(folder), str(tmp_path), "stops", settings)[0]["metrics"][-1]
    assert last["loss"] < 0.5
    adapter = tmp_path / "stops" / "adapter"

    tokenizer = AutoTokenizer.from_pretrained(adapter)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer))  # the only line more
    peft_model = PeftModel.from_pretrained(model, adapter).eval()
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "lazy dog"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = peft_model.generate(**ids, max_new_tokens=24, do_sample=False, eos_token_id=tokenizer.eos_token_id)
    answer = out[0, ids["input_ids"].shape[1] :].tolist()
    assert tokenizer.decode(answer) == "seven small ships" + TOKENS[1]
    assert pool.run(num_ranks, _answers, str(folder), str(adapter)) == num_ranks * [answer]

    tensors = load_file(adapter / "adapter_model.safetensors")
    lora = sum(tensor.nbytes for name, tensor in tensors.items() if ".lora_" in name)
    assert (adapter / "adapter_model.safetensors").stat().st_size < 1.2 * lora


def _held(ranks: Ranks, folder: str, groups: dict) -> tuple[dict[str, int], dict[str, int]]:
    """Return the bytes of this rank's adapters and optimizer states after a step, and those planned for the fullest."""
    prepared = build(ranks, folder, **groups)
    optimizer = ShardedOptimizer(trainable_parameters(prepared.model), prepared.config.optim)
    optimizer.prepare_state(1)
    held = {
        "adapters": sum(local_tensor(p).nbytes for _, p in trainable_parameters(prepared.model)),
        "optimizer": optimizer.state_bytes(),
    }
    return held, {kind: getattr(prepared.plan.bytes, kind) for kind in held}


@pytest.mark.parametrize("adapters", ["sharded", "replicated"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_plan_counts_the_rows_exactly(pool, tmp_path, tied, adapters):
    groups = {"model": {"add_tokens": TOKENS}, "fsdp": {"adapters": adapters}}
    of_ranks = pool.run(2, _held, str(_model(tmp_path, tied, 0)), groups)
    planned = of_ranks[0][1]
    assert {kind: max(held[kind] for held, _ in of_ranks) for kind in planned} == planned


def test_goes_on_with_the_same_bits_on_another_number_of_ranks(pool, tmp_path):
    folder = _model(tmp_path, False, 1)
    settings = _settings(tmp_path, 4) | {"checkpoint": {"every_steps": 2}}
    first = pool.run(2, run_fit, str(folder), str(tmp_path), "run", settings)[0]["metrics"]
    saved = tmp_path / "run" / "checkpoints" / "step_00000002"
    states = [
        pool.run(n, loaded_state, str(folder), str(tmp_path), str(saved), _settings(tmp_path, 4))[0] for n in (1, 2, 3)
    ]
    assert any(name.endswith("tokens_delta") for name in states[0])
    assert states[0] == states[1] == states[2]
    again = _settings(tmp_path, 4) | {"checkpoint": {"resume": str(saved)}, "run": {"name": "again"}}
    more = pool.run(2, run_fit, str(folder), str(tmp_path), "again", again)[0]["metrics"]
    assert losses(more)[-2:] == losses(first)[-2:]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["the", "<|x|>"], "already has 'the'"),
        (["<|x|>", "<|x|>"], "named more than once"),
        (["  "], "must not be empty"),
    ],
)
def test_bad_tokens_are_refused(tmp_path, tokens, message):
    with pytest.raises(FsdpQloraError, match=message) as raised:
        prepare_tokens(config_of(str(_model(tmp_path, True, 0)), **_settings(tmp_path, 1, tokens)))
    assert raised.value.exit_code == 2
    assert len(str(raised.value).splitlines()) == 1
