"""What must hold on a GPU as it does on a CPU: formats, bytes under FSDP, and a training that gives the CPU's losses.

Made for machines without network: a random model built on the spot, token rows drawn from a seed, and no import of
`datasets`, `wandb` or Hydra (launch/gpu_bundle.py explains). FSDP_QLORA_TEST_DEVICE=cpu is a dry run of the same code.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from fsdp_qlora.adapters.lora import attach_lora, initialize_adapters
from fsdp_qlora.adapters.names import trainable_parameters
from fsdp_qlora.attention.candidates import attention_candidates
from fsdp_qlora.checks.gather import verify_gather
from fsdp_qlora.checks.gradients import FirstGradients
from fsdp_qlora.cli.quiet import quieten
from fsdp_qlora.config.schema import DataSettings, LoraSettings, OptimSettings, PrecisionSettings, RunConfig
from fsdp_qlora.data.labels import IGNORE, ROWS, TOKENS
from fsdp_qlora.data.loader import Batch, TokenBatch
from fsdp_qlora.distributed.memory import memory_peak
from fsdp_qlora.distributed.mesh import Ranks, build_ranks
from fsdp_qlora.distributed.process import Placement, choose_device, process_group, use_device
from fsdp_qlora.distributed.shards import local_tensor
from fsdp_qlora.heads.upstream import after_head
from fsdp_qlora.load.safetensors import SafetensorsFolder
from fsdp_qlora.load.stream import stream_weights
from fsdp_qlora.model.config import load_config
from fsdp_qlora.model.root import CausalModel, install_loss_head
from fsdp_qlora.model.skeleton import build_skeleton, read_shapes
from fsdp_qlora.objectives import build_objective
from fsdp_qlora.optim.optimizers import ShardedOptimizer
from fsdp_qlora.parallel.shard import mixed_precision, model_dtype, require_sharded, shard_model, synchronize_gradients
from fsdp_qlora.plan.plan import make_plan
from fsdp_qlora.quant.formats import QuantizedTensor, build_format, dequantize, quantize
from fsdp_qlora.quant.linear import QuantLinear
from fsdp_qlora.quant.matrices import STATISTICS
from fsdp_qlora.quant.packing import STORAGE_DTYPE, bits_to_float, raw_bytes, rows_to_bytes
from fsdp_qlora.quant.swap import swap_linears
from fsdp_qlora.train.step import StepSettings, train_step

DEVICE = os.environ.get("FSDP_QLORA_TEST_DEVICE", "cuda")
_HERE = DEVICE == "cpu" or getattr(torch, DEVICE).is_available()

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not _HERE, reason=f"torch finds no {DEVICE} device here")]

FORMATS = [build_format(name, double) for name in ("nf4", "fp4") for double in (True, False)]
SHAPE = (384, 500)  # 192,000 weights: 11 rows and a part of the twelfth
LEVEL = 1 / 3
"""Widest gap between neighbouring values of NF4 and FP4, as a share of the block's absmax."""
FLIPPED = {"nf4": 1e-3, "fp4": 1e-2}
"""Share of codes that may differ between devices: weights on the border of two values to the last bits. FP4's borders
are simple fractions, which a bf16 weight over a bf16 maximum often is (0.6 % on an H100)."""


@contextmanager
def world(kind: str) -> Iterator[Ranks]:
    """One rank on a device of ``kind``, with its process group (NCCL on a GPU, gloo on a CPU)."""
    placement = Placement(rank=0, local_rank=0, world_size=1, local_world_size=1)
    device = choose_device(kind, placement)
    use_device(device)
    with process_group(device, placement, timeout_seconds=120) as group:
        yield build_ranks(group, device)


def moved(quantized: QuantizedTensor, device: str) -> QuantizedTensor:
    parts = (quantized.packed, quantized.absmax, quantized.nested, quantized.offset)
    return QuantizedTensor(*(None if part is None else part.to(device) for part in parts))  # type: ignore[arg-type]


def nibbles(quantized: QuantizedTensor) -> torch.Tensor:
    codes = rows_to_bytes(quantized.packed, SHAPE[0] * SHAPE[1]).cpu()
    return torch.stack([codes >> 4, codes & 15])


@pytest.mark.parametrize("quant_format", FORMATS, ids=str)
def test_quantize_gives_the_codes_of_the_cpu(quant_format):
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).mul(0.02).bfloat16()
    on_cpu, on_device = quantize(weight, quant_format), quantize(weight.to(DEVICE), quant_format)
    assert on_device.packed.device.type == DEVICE
    flipped = (nibbles(on_cpu) != nibbles(on_device)).float().mean().item()
    assert flipped <= FLIPPED[quant_format.name]
    if quant_format.double_quant:
        # The offset is a mean: its last bits depend on a sum's order, and on them, rarely, a statistic's 8-bit code.
        torch.testing.assert_close(on_device.offset.cpu(), on_cpu.offset, rtol=1e-5, atol=0)
        nested = bits_to_float(on_device.nested).cpu(), bits_to_float(on_cpu.nested)
        torch.testing.assert_close(*nested, rtol=1e-4, atol=1e-7)
        assert (on_device.absmax.cpu() != on_cpu.absmax).float().mean().item() <= 0.01
    else:
        assert torch.equal(on_device.absmax.cpu(), on_cpu.absmax), "a maximum is exact on every device"
    ours = dequantize(on_device, quant_format, SHAPE, torch.float32).cpu()
    theirs = dequantize(on_cpu, quant_format, SHAPE, torch.float32)
    largest = weight.float().abs().max()
    assert (ours - theirs).abs().max() <= 1.1 * LEVEL * largest, "a flipped code is off by one value at most"
    # A flipped code is as far from its weight as the other one is: it was on the border.
    errors = [(found - weight.float()).abs() for found in (ours, theirs)]
    assert (errors[0] - errors[1]).abs().mean() <= 1e-3 * theirs.abs().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quant_format", FORMATS, ids=str)
def test_dequantize_gives_the_weights_of_the_cpu(quant_format, dtype):
    quantized = quantize(torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)), quant_format)
    expected = dequantize(quantized, quant_format, SHAPE, dtype)
    weights = dequantize(moved(quantized, DEVICE), quant_format, SHAPE, dtype).cpu()
    # float32: the devices' constants may differ in the last bits; bfloat16: one unit in the last place.
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(weights, expected, rtol=tolerance, atol=1e-7)


def test_quant_linear_multiplies_and_differentiates_as_on_the_cpu():
    quant_format = build_format()
    quantized = quantize(torch.randn(SHAPE, generator=torch.Generator().manual_seed(2)), quant_format)
    results = []
    for device in ("cpu", DEVICE):
        layer = QuantLinear(SHAPE[1], SHAPE[0], quant_format, dtype=torch.float32, device=device)
        layer.fill(moved(quantized, device))
        x = torch.randn(7, SHAPE[1], generator=torch.Generator().manual_seed(3)).to(device).requires_grad_()
        out = layer(x)
        out.square().mean().backward()
        assert all(p.grad is None for p in layer.parameters())
        results.append((out.detach().cpu(), x.grad.cpu()))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_every_bit_pattern_survives_the_gather(precision):
    """All 65,536 patterns of the storage dtype: NaN with payloads, infinities, denormals, both zeros."""
    size = 512  # 512 x 512 weights: 16 rows of 4,096 bf16 elements
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(STORAGE_DTYPE).view(16, 4096)
    assert patterns.isnan().any()
    assert patterns.isinf().any()
    generator = torch.Generator().manual_seed(4)
    written = QuantizedTensor(
        packed=patterns,
        absmax=torch.randint(0, 256, (16, 256), generator=generator).to(torch.uint8),
        nested=torch.tensor([0x7FC00001, 0x7F800000, 1, -1] * 4, dtype=torch.int32).view(16, 1),
        offset=torch.tensor(0.5),
    )
    with world(DEVICE) as ranks:
        model = nn.Sequential(*(QuantLinear(size, size, build_format()) for _ in range(2)))
        shard_model(model, [[layer] for layer in model], ranks, mixed_precision(precision))
        model.to_empty(device=ranks.device)
        for layer in model:
            layer.fill(moved(written, str(ranks.device)))  # type: ignore[operator]
        for layer in model:
            layer.unshard()  # type: ignore[operator]
            for name in ("packed", *STATISTICS):
                gathered = getattr(layer, name)
                assert gathered.device.type == DEVICE
                assert torch.equal(raw_bytes(gathered).cpu(), raw_bytes(getattr(written, name))), name
            layer.reshard()  # type: ignore[operator]
            assert torch.equal(raw_bytes(local_tensor(layer.packed)).cpu(), raw_bytes(patterns))


def batch_of(micro_batches: list[TokenBatch]) -> Batch:
    """Return one rank's global batch of these."""
    targets = sum(int((x.labels[:, 1:] != IGNORE).sum()) for x in micro_batches)
    tokens = sum(x.input_ids.numel() for x in micro_batches)
    rows = sum(len(x.input_ids) for x in micro_batches)
    return Batch(micro_batches, rows, tokens, {TOKENS: targets, ROWS: rows})


def draw_batch(vocabulary: int) -> Batch:
    """Two micro-batches of three rows, of unequal length, with a prompt that is not learned and padding at the end."""
    generator = torch.Generator().manual_seed(5)
    micro_batches = []
    for number, length in enumerate((24, 40)):
        input_ids = torch.randint(3, vocabulary, (3, length), generator=generator)
        labels = input_ids.clone()
        labels[:, :6] = IGNORE
        labels[1, length - 7 :] = IGNORE
        micro_batches.append(TokenBatch(number, input_ids, labels))
    return batch_of(micro_batches)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """Folder of a random two-layer Llama: config and safetensors, no tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(6)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=352, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=384, max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def make_real(folder: Path, config: RunConfig, ranks: Ranks) -> CausalModel:
    """The stages of `fsdp_qlora.prepare`, one by one."""
    precision = config.precision.name
    dtype = model_dtype(precision)
    base = build_skeleton(folder, dtype, attention_candidates(ranks.device, None, load_config(folder), dtype)[0])
    after = after_head(base)
    plan = make_plan(config, read_shapes(base), ranks.size)
    swapped = swap_linears(base, plan.quantized, build_format())
    assert len(swapped) == 14
    install_loss_head(base, after, chunk=32)
    model = CausalModel(attach_lora(base, plan.targets, config.lora.r, config.lora.alpha))
    units = [[base.get_submodule(name) for name in unit] for unit in plan.units]
    shard_model(model, units, ranks, mixed_precision(precision))
    require_sharded(model, ranks)
    stream_weights(model, model.base, SafetensorsFolder(folder), ranks)
    initialize_adapters(model, config.run.seed, ranks.shard_rank, ranks.shard_size)
    verify_gather(model, ranks)
    return model


def note_gradients(model: nn.Module, seen: set[str], step: int) -> None:
    seen |= {name for name, p in model.named_parameters() if p.grad is not None}


def train(folder: Path, kind: str, precision: str, num_steps: int = 3) -> tuple[list[float], int]:
    """Train on one batch; return the losses and the peak of the device's memory."""
    config = RunConfig(
        data=DataSettings(max_length=64), lora=LoraSettings(r=8), precision=PrecisionSettings(name=precision),
        optim=OptimSettings(lr=5e-3),
    )  # fmt: skip
    with world(kind) as ranks:
        if kind != "cpu":
            torch.accelerator.reset_peak_memory_stats()
        model = make_real(folder, config, ranks).train()
        frozen = {n: raw_bytes(local_tensor(p)).cpu() for n, p in model.named_parameters() if not p.requires_grad}
        optimizer = ShardedOptimizer(trainable_parameters(model), config.optim)
        seen: set[str] = set()
        settings = StepSettings(
            objective=build_objective("sft"), ranks=ranks, seed=0, max_grad_norm=1.0, synchronize=synchronize_gradients,
            around=nullcontext,
            checks=(FirstGradients(model, ranks), partial(note_gradients, model, seen)),
        )  # fmt: skip
        batch = draw_batch(384)
        losses = [
            train_step(model, batch, optimizer, config.optim.lr, number, False, settings).loss
            for number in range(1, num_steps + 1)
        ]
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert seen == trained
        assert len(trained) == 28
        assert all(".lora_A." in name or ".lora_B." in name for name in trained)
        for name, p in model.named_parameters():
            assert p.device.type == kind
            assert name in trained or torch.equal(raw_bytes(local_tensor(p)).cpu(), frozen[name]), name
        return losses, memory_peak(ranks.device)[0]


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 1e-2), ("fp32", 1e-3)])
def test_training_gives_the_losses_of_the_cpu(llama, precision, tolerance, capsys, record_property):
    """Three steps of sharded QLoRA. The tolerance holds rare flipped codes and, in bf16, the attention's rounding."""
    quieten()
    expected, _ = train(llama, "cpu", precision)
    losses, peak = train(llama, DEVICE, precision)
    assert all(torch.isfinite(torch.tensor(losses)))
    assert losses == pytest.approx(expected, rel=tolerance)
    assert losses[-1] < losses[0]
    assert peak > 0
    record_property("peak_memory_bytes", peak)
    with capsys.disabled():
        shown = ", ".join(f"{a:.4f} (cpu {b:.4f})" for a, b in zip(losses, expected, strict=True))
        print(f"\n{DEVICE} {precision}: losses {shown}; peak memory {peak / 2**20:.1f} MiB")
