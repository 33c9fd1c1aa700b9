"""Every fast path gives what the plain path gives (`debug=plain`), and keeps what it says it keeps."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.shards import local_tensor
from fsdp_qlora.model.families import decoder_layers
from tests.build import build, losses, norms, run_fit
from tests.pool import Pool

PLAIN = {"debug": {"name": "plain"}}
FAST: dict[str, dict[str, dict[str, Any]]] = {
    "as auto decides": {},
    "products together": {"quant": {"cache_dequantized": "false"}, "fsdp": {"reshard_after_forward": "true"}},
    "dense weights kept": {"quant": {"cache_dequantized": "true"}, "fsdp": {"reshard_after_forward": "true"}},
    "layers stay gathered": {"quant": {"cache_dequantized": "false"}, "fsdp": {"reshard_after_forward": "false"}},
    "selective": {"train": {"activation_checkpointing": "selective"}},
    "full": {"train": {"activation_checkpointing": "full"}},
    "compiled": {"train": {"compile": "true"}},
    "compiled kernels": {"train": {"kernels": "compile"}},
    "compiled kernels, offloaded": {"train": {"kernels": "compile"}, "fsdp": {"offload": "activations"}},
    "compiled layers and kernels": {"train": {"kernels": "compile", "compile": "true"}},
    "compiled, full": {"train": {"compile": "true", "activation_checkpointing": "full"}},
    "compiled, selective": {"train": {"compile": "true", "activation_checkpointing": "selective"}},
}
KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "nf4": {},
    "nf4 without double quantization": {"quant": {"double_quant": False}},
    "fp4": {"quant": {"name": "fp4"}},
    "int8": {"quant": {"name": "int8", "double_quant": False}},
    "bf16 base": {"quant": {"name": "none"}},
    "dropout": {"lora": {"dropout": 0.1}},
    "packed": {"data": {"packing": True}, "model": {"attn_implementation": "auto"}},
}
UNCOMPARED = {("dense weights kept", "bf16 base"), ("dense weights kept", "int8"), ("compiled", "dropout")}
"""What cannot be: nothing to dequantize, and compiled layers, which draw other numbers for dropout."""
COMPILED_KINDS = ("nf4", "packed")
"""What is compiled in every way; the other kinds have only their layers compiled."""
QUICK = {("as auto decides", "nf4"), ("selective", "nf4"), ("full", "fp4")}


def _merged(*parts: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for part in parts:
        for group, values in part.items():
            found[group] = {**found.get(group, {}), **values}
    return found


def _train(pool: Pool, num_ranks: int, folder: Path, rows: Path, root: Path, groups: Any) -> list[dict[str, Any]]:
    common = {
        "data": {"train": str(rows), "max_length": 96}, "precision": {"name": "fp32"}, "schedule": {"name": "constant"},
        "train": {"max_steps": 3, "global_batch_size": 6, "micro_batch_size": 2},
    }  # fmt: skip
    name = f"run{sum(1 for _ in root.iterdir())}"
    return pool.run(num_ranks, run_fit, str(folder), str(root), name, _merged(common, groups))[0]["metrics"]


CASES = [
    pytest.param(fast, kind, marks=() if (fast, kind) in QUICK else pytest.mark.full)
    for fast, kind in itertools.product(FAST, KINDS)
    if (fast, kind) not in UNCOMPARED and (not fast.startswith(("compiled,", "compiled ")) or kind in COMPILED_KINDS)
]


@pytest.mark.parametrize(("fast", "kind"), CASES)
def test_a_fast_path_gives_what_the_plain_path_gives(pool, tiny_model, chat_rows, tmp_path, fast, kind):
    """With accumulation (three micro-batches, so on two ranks one of weight zero), in fp32."""
    plain = _train(pool, 1, tiny_model, chat_rows, tmp_path, _merged(PLAIN, KINDS[kind]))
    # a compilation takes half a minute
    one_too = not fast.startswith("compiled") or (fast, kind) == ("compiled", "packed")
    for num_ranks in (1, 2) if one_too else (2,):
        found = _train(pool, num_ranks, tiny_model, chat_rows, tmp_path, _merged(FAST[fast], KINDS[kind]))
        # compiled layers sum in another order; so does attention by blocks
        near = 1 if kind != "int8" else 30  # the last bit of an input decides how some of them are rounded to 8 bits
        assert losses(found) == pytest.approx(losses(plain), rel=near * 1e-5)
        assert norms(found) == pytest.approx(norms(plain), rel=near * 3e-4)


@pytest.mark.parametrize(("num_ranks", "layout"), [(1, "shard"), (2, "copies")])
def test_dense_weights_that_stay_from_step_to_step_change_no_bit(
    pool: Pool, tiny_model: Path, chat_rows: Path, tmp_path: Path, num_ranks: int, layout: str
) -> None:
    """Against dequantizing twice for each micro-batch."""
    groups = {
        "data": {"train": str(chat_rows), "max_length": 96}, "fsdp": {"replicate_degree": num_ranks},
        "train": {"max_steps": 3, "global_batch_size": 6, "micro_batch_size": 2},
    }  # fmt: skip
    kept, again = (
        pool.run(
            num_ranks, run_fit, str(tiny_model), str(tmp_path), keep, {**groups, "quant": {"cache_dequantized": keep}},
            layout=layout,
        )[0]["metrics"]
        for keep in ("true", "false")
    )  # fmt: skip
    assert losses(kept) == losses(again) and norms(kept) == norms(again) and len(losses(kept)) == 3


def _kept_bytes(ranks: Ranks, folder: str, train: dict[str, Any]) -> int:
    """Return the bytes that the decoder layers keep from forward to backward, parameters apart."""
    prepared = build(ranks, folder, train={"micro_batch_size": 2, **train}, fsdp={"reshard_after_forward": "false"})
    model = prepared.model.train()
    ids = torch.arange(2 * 64).remainder(200).view(2, 64)
    model(ids, ids).sum().backward()
    kept: dict[int, torch.UntypedStorage] = {}
    gathered: set[int] = set()

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    for layer in decoder_layers(model.base):
        layer.register_forward_pre_hook(
            lambda module, _: gathered.update(local_tensor(p).untyped_storage()._cdata for p in module.parameters())
        )
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(ids, ids)
    return sum(storage.nbytes() for key, storage in kept.items() if key not in gathered)


@pytest.mark.full
@pytest.mark.parametrize(("kind", "share"), [("full", 0.25), ("selective", 0.75)])
def test_compiled_layers_keep_what_checkpointing_keeps(pool: Pool, tiny_model: Path, kind: str, share: float) -> None:
    whole = {"activation_checkpointing": "none", "compile": "false"}
    asked = {"activation_checkpointing": kind, "compile": "true"}
    (everything,), (compiled,) = (pool.run(1, _kept_bytes, str(tiny_model), train) for train in (whole, asked))
    assert compiled < share * everything


def _choices(ranks: Ranks, folder: str, groups: dict[str, Any]) -> tuple[dict[str, str], str, bool]:
    prepared = build(ranks, folder, **groups)
    return (
        {key: str(choice) for key, choice in prepared.choices.items()},
        prepared.plan.settings.checkpointing,
        prepared.model.compiled,
    )


def test_auto_is_said_and_done(pool: Pool, tiny_model: Path, chat_rows: Path) -> None:
    groups = {"data": {"train": str(chat_rows)}}
    choices, checkpointing, compiled = pool.run(2, _choices, str(tiny_model), groups)[0]
    assert set(choices) == {
        "train.activation_checkpointing", "fsdp.reshard_after_forward", "quant.cache_dequantized",
        "model.attn_implementation", "model.check", "train.compile", "train.kernels", "train.eval_every",
    }  # fmt: skip
    assert checkpointing == "none" and choices["model.attn_implementation"] == "blockwise"
    assert choices["fsdp.reshard_after_forward"].startswith("false (fits")
    assert not compiled and choices["train.compile"].startswith("false (would save about 0 ")
    asked = {**groups, "train": {"compile": "true", "activation_checkpointing": "full"}}
    choices, checkpointing, compiled = pool.run(2, _choices, str(tiny_model), asked)[0]
    assert compiled and checkpointing == "full" and choices["train.compile"] == "true (as asked)"
    assert "train.activation_checkpointing" not in choices
    plain, _, compiled = pool.run(2, _choices, str(tiny_model), _merged(groups, PLAIN))[0]
    assert plain["model.attn_implementation"] == "eager" and not compiled
