"""On a GPU: offload changes the losses by no more than another device's optimizer does, and the peak falls.

FSDP_QLORA_TEST_DEVICE=cpu is a dry run of the same code, without what a GPU's memory meter says.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fsdp_qlora.adapters.lora import initialize_adapters
from fsdp_qlora.adapters.names import trainable_parameters
from fsdp_qlora.attention.layout import Layout
from fsdp_qlora.checks.gather import verify_gather
from fsdp_qlora.checks.gradients import FirstGradients
from fsdp_qlora.checks.isolation import try_isolation
from fsdp_qlora.config.schema import (
    DataSettings,
    FsdpSettings,
    LoraSettings,
    ModelSettings,
    OptimSettings,
    RunConfig,
    TrainSettings,
)
from fsdp_qlora.data.loader import Batch, TokenBatch
from fsdp_qlora.distributed.memory import memory_peak
from fsdp_qlora.distributed.shards import local_tensor
from fsdp_qlora.export.adapter import gather_adapter
from fsdp_qlora.load.safetensors import SafetensorsFolder
from fsdp_qlora.load.stream import stream_weights
from fsdp_qlora.model.skeleton import build_skeleton, read_shapes
from fsdp_qlora.objectives import build_objective
from fsdp_qlora.optim.optimizers import ShardedOptimizer
from fsdp_qlora.parallel.shard import model_dtype, synchronize_gradients
from fsdp_qlora.plan.plan import make_plan
from fsdp_qlora.run.build import build_sharded
from fsdp_qlora.train.step import StepSettings, train_step
from tests.gpu.test_gpu import _HERE, DEVICE, batch_of, world

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not _HERE, reason=f"torch finds no {DEVICE} device here")]

LENGTH, VOCABULARY = (1024, 8192) if DEVICE != "cpu" else (64, 384)


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random 8-layer Llama whose activations and parameters are worth moving (small in the dry run)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    size = 1024 if DEVICE != "cpu" else 64
    config = LlamaConfig(
        hidden_size=size, intermediate_size=3 * size, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=VOCABULARY, max_position_embeddings=LENGTH, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "wide"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def draw() -> Batch:
    generator = torch.Generator().manual_seed(8)
    ids = [torch.randint(3, VOCABULARY, (2, LENGTH), generator=generator) for _ in range(2)]
    return batch_of([TokenBatch(number, x, x.clone()) for number, x in enumerate(ids)])


def train(folder: Path, offload: str, checkpointing: str, prefetch: int = 1) -> dict[str, object]:
    """Three steps; return losses, peak and what the adapter became."""
    config = RunConfig(
        model=ModelSettings(name=str(folder), attn_implementation="eager"),  # its backward adds in a fixed order
        data=DataSettings(max_length=LENGTH), lora=LoraSettings(r=8), optim=OptimSettings(lr=1e-3),
        fsdp=FsdpSettings(offload=offload, prefetch=prefetch), train=TrainSettings(activation_checkpointing=checkpointing),
    )  # fmt: skip
    with world(DEVICE) as ranks:
        base = build_skeleton(folder, model_dtype("bf16"), "eager")
        shapes = read_shapes(base)
        plan = make_plan(config, shapes, 1)
        model = build_sharded(config, base, shapes, plan, ranks)
        shards_on = torch.device("cpu") if config.fsdp.offloads_parameters else ranks.device
        stream_weights(model, base, SafetensorsFolder(folder), ranks, shards_on=shards_on)
        initialize_adapters(model, 0)
        verify_gather(model, ranks)
        assert {local_tensor(p).device.type for p in model.parameters()} == {shards_on.type}
        assert {b.device.type for b in model.buffers()} == {DEVICE}
        packed = replace(config.data, packing=True)
        try_isolation(model.train(), Layout.of(packed, config.train, "eager"), ranks)
        optimizer = ShardedOptimizer(trainable_parameters(model), config.optim)
        settings = StepSettings(
            objective=build_objective("sft"), ranks=ranks, seed=0, max_grad_norm=1.0, synchronize=synchronize_gradients,
            around=nullcontext, checks=(FirstGradients(model, ranks),),
        )  # fmt: skip
        if DEVICE != "cpu":
            torch.accelerator.reset_peak_memory_stats()
        batch = draw()
        losses = [train_step(model, batch, optimizer, 1e-3, number, False, settings).loss for number in (1, 2, 3)]
        peak = memory_peak(ranks.device)[0]
        states = {t.device.type for s in optimizer._optimizer.state.values() for t in s.values() if t.dim()}
        assert states == {shards_on.type}
        prompt = batch.micro_batches[0].input_ids[:1, :8].to(ranks.device)
        answer = model.eval().generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4)
        assert answer.device.type == DEVICE
        return {"losses": losses, "peak": peak, "adapter": gather_adapter(model)}


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_offload_gives_the_same_losses_in_less_memory(wide_llama, checkpointing, capsys, record_property):
    plain = train(wide_llama, "none", checkpointing)
    assert plain["losses"][-1] < plain["losses"][0]
    for offload in ("activations", "params", "all"):
        found = train(wide_llama, offload, checkpointing)
        record_property(f"{offload}_peak_memory_bytes", found["peak"])
        with capsys.disabled():
            print(f"\n{checkpointing} {offload}: peak {found['peak'] / 2**20:.1f} of {plain['peak'] / 2**20:.1f} MiB")
        if offload == "activations" or DEVICE == "cpu":
            assert found["losses"] == plain["losses"]
            assert all(torch.equal(t, plain["adapter"][name]) for name, t in found["adapter"].items())
        else:  # AdamW ran on the CPU
            assert found["losses"][0] == plain["losses"][0]
            assert found["losses"] == pytest.approx(plain["losses"], rel=1e-3)
        # of params the peak depends on which copies are on their way; with full checkpointing: docs/gpu.md, "Open"
        if DEVICE != "cpu" and offload != "params" and checkpointing == "none":
            assert found["peak"] < 0.7 * plain["peak"]


def test_prefetch_gives_the_same_losses(wide_llama):
    plain = train(wide_llama, "none", "none")
    for depth in (2, 3):
        assert train(wide_llama, "none", "none", depth)["losses"] == plain["losses"]
