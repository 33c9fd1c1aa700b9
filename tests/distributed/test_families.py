"""Every family of models trains as transformers + bitsandbytes + PEFT do, on any number of ranks."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from fsdp_qlora.config.schema import DataSettings
from fsdp_qlora.data.loader import Cut, Loader, TokenRows
from fsdp_qlora.data.prepare import prepare_data
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.reduce import all_sum
from fsdp_qlora.load.stream import resident_bytes
from fsdp_qlora.quant.matrices import QuantMatrices
from tests.build import build, losses, run_fit
from tests.families import FAMILIES, adapter_targets, reference, reference_losses, write_family
from tests.tiers import some_in_full
from tests.tolerances import BF16_FIRST_LOSS, BF16_LOSSES, UPSTREAM_FIRST_LOSS, UPSTREAM_LOSSES, close
from tests.upstream import rounded_to_nf4

STEPS, LR = 4, 2e-3


QUICK = {"qwen3", "gpt2", "qwen3_moe"}


def _groups(rows, embeddings="none"):
    return {
        "data": {"train": str(rows), "max_length": 64, "max_rows": 6}, "quant": {"embeddings": embeddings},
        "train": {"max_steps": STEPS, "global_batch_size": 6, "micro_batch_size": 2},
        "optim": {"lr": LR}, "schedule": {"name": "constant", "warmup_ratio": 0.0},
    }  # fmt: skip


def _batches(folder, rows, cache):
    data = DataSettings(train=str(rows), max_length=64, max_rows=6)
    tokens = prepare_data(data, 0, AutoTokenizer.from_pretrained(folder), cache)
    loader = Loader(TokenRows(tokens.train), 6, Cut(2, 0, 1), 0)
    return (loader.batch_at(position) for position in range(0, STEPS * 6, 6))


@pytest.mark.parametrize("family", some_in_full(FAMILIES, QUICK))
def test_a_family_trains_as_upstream_does(pool, chat_rows, tmp_path, family):
    folder = write_family(tmp_path / "model", family)
    found = {}
    for num_ranks in (1, 2):
        run = pool.run(num_ranks, run_fit, str(folder), str(tmp_path), f"on{num_ranks}", _groups(chat_rows))[0]
        found[num_ranks] = losses(run["metrics"])
    model = reference(folder, adapter_targets(tmp_path / "on1" / "adapter"), r=4, alpha=8)
    wanted = reference_losses(model, _batches(folder, chat_rows, tmp_path / "cache"), LR)
    assert wanted[0] - wanted[-1] > 0.01
    assert close(found[1], wanted, UPSTREAM_LOSSES)
    assert abs(found[1][0] - wanted[0]) / wanted[0] < UPSTREAM_FIRST_LOSS
    assert close(found[2], found[1], BF16_LOSSES)
    assert abs(found[2][0] - found[1][0]) / found[1][0] < BF16_FIRST_LOSS


def _stored(ranks: Ranks, folder: str, rows: str) -> tuple[int, int, list[str]]:
    """Return planned and held bytes of this rank's 4-bit weights, and the names of what is packed."""
    prepared = build(ranks, folder, data={"train": rows})
    modules = {n: m for n, m in prepared.model.base.named_modules() if isinstance(m, QuantMatrices)}
    planned = prepared.plan.bytes
    held = sum(resident_bytes(m) for m in modules.values())
    return planned.base_packed + planned.base_statistics, held, sorted(modules)


@pytest.mark.parametrize("family", some_in_full(["mixtral", "qwen3_moe"], {"qwen3_moe"}))
def test_experts_are_4_bit_and_the_plan_counts_them_exactly(pool, chat_rows, tmp_path, family):
    folder = write_family(tmp_path / "model", family)
    for num_ranks in (1, 2, 3):
        found = pool.run(num_ranks, _stored, str(folder), str(chat_rows))
        planned, held, names = found[0]  # the fullest rank
        assert planned == held == max(h for _, h, _ in found)
        assert sum(".experts." in name for name in names) == 4


@pytest.mark.parametrize(
    "family", some_in_full(["llama", "qwen3", "gemma2", "gemma3_text", "phi"], {"llama", "gemma2"})
)
def test_quantized_embedding_and_head_give_the_losses_of_dense_ones_with_the_same_values(
    pool, chat_rows, tmp_path, family
):
    """The reference: a model whose 16-bit embedding and head hold what 4 bits can say."""
    from transformers import AutoModelForCausalLM

    folder = write_family(tmp_path / "model", family)
    quantized = pool.run(2, run_fit, str(folder), str(tmp_path), "packed", _groups(chat_rows, "nf4"))[0]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    edges = {m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    with torch.no_grad():
        for weight in edges:
            weight.copy_(rounded_to_nf4(weight.data))
    dense = tmp_path / "dense"
    model.save_pretrained(dense)
    AutoTokenizer.from_pretrained(folder).save_pretrained(dense)
    plain = pool.run(2, run_fit, str(dense), str(tmp_path), "plain", _groups(chat_rows))[0]
    found, wanted = losses(quantized["metrics"]), losses(plain["metrics"])
    assert abs(found[0] - wanted[0]) / wanted[0] < 1e-4
    assert close(found, wanted, BF16_LOSSES)
    assert wanted[0] - wanted[-1] > 0.01


def _masked_or_paired(family: str, vocab: int) -> tuple[dict, torch.Tensor]:
    """Return inputs and labels of four rows: pairs for an encoder-decoder, every third token hidden for an encoder."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(5, vocab, (4, 12), generator=generator)
    if family == "t5":
        labels = torch.randint(5, vocab, (4, 8), generator=generator)
        return {"input_ids": ids, "decoder_input_ids": torch.roll(labels, 1, dims=1)}, labels
    labels = torch.where(torch.arange(12) % 3 == 0, ids, -100)
    return {"input_ids": torch.where(labels == -100, ids, 3)}, labels


def _own_loop(run, parameters, inputs, labels, rows, num_targets, total):
    """Train three steps on ``rows`` by plain transformers outputs; return the losses over all ranks' rows."""
    optimizer = torch.optim.AdamW(parameters, lr=5e-3, weight_decay=0.0)
    found = []
    for _ in range(3):
        logits = run(**{k: v[rows] for k, v in inputs.items()}).logits.float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[rows].flatten(), reduction="sum")
        (loss / num_targets).backward()
        found.append(total(float(loss.detach())) / num_targets)
        optimizer.step()
        optimizer.zero_grad()
    return found


def _trained_otherwise(ranks: Ranks, folder: str, family: str) -> tuple[list[float], list[str]]:
    prepared = build(ranks, folder)
    inputs, labels = _masked_or_paired(family, prepared.shapes.vocab_size)
    parameters = [p for p in prepared.model.parameters() if p.requires_grad]
    total = lambda value: all_sum([value], ranks)[0]  # noqa: E731
    rows = slice(ranks.rank, None, ranks.size)
    prepared.model.train()
    count = int((labels != -100).sum())
    return _own_loop(prepared.model.outputs, parameters, inputs, labels, rows, count, total), list(
        prepared.plan.targets
    )


@pytest.mark.parametrize("family", ["t5", "bert"])
def test_encoder_decoders_and_encoders_load_and_train_as_upstream_does(pool, tmp_path, family):
    folder = write_family(tmp_path / "model", family)
    (one, targets), two = (pool.run(n, _trained_otherwise, str(folder), family)[0] for n in (1, 2))
    model = reference(folder, targets, r=4, alpha=8).train()
    inputs, labels = _masked_or_paired(family, model.config.vocab_size)
    parameters = [p for p in model.parameters() if p.requires_grad]
    count = int((labels != -100).sum())
    wanted = _own_loop(model, parameters, inputs, labels, slice(None), count, float)
    assert wanted[0] - wanted[-1] > 0.01
    assert close(one, wanted, UPSTREAM_LOSSES)
    assert close(two[0], one, BF16_LOSSES)


def test_what_the_objective_cannot_train_is_said(pool, chat_rows, tmp_path):
    folder = write_family(tmp_path / "model", "t5")
    with pytest.raises(Exception, match="not a causal language model, and objective=sft trains only those"):
        pool.run(1, run_fit, str(folder), str(tmp_path), "no", _groups(chat_rows))
