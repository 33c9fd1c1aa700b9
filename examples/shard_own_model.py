"""Shard a model of your own, without transformers: frozen 4-bit layers, small trainable ones, 2 ranks, one step.

    torchrun --nproc-per-node 2 examples/shard_own_model.py

The frozen layers start on the meta device. Each rank then quantizes its own rows only, so no rank ever holds a whole
weight. The trainable parts are small: drawn alike on every rank, of which FSDP2 keeps a slice each.
"""

import torch
import torch.nn.functional as F
from torch import nn

from fsdp_qlora import QuantFormat, QuantLinear, shard_model
from fsdp_qlora.dist.mesh import Ranks, build_ranks
from fsdp_qlora.dist.process import Placement, process_group
from fsdp_qlora.dist.reduce import all_sum, gather_json
from fsdp_qlora.model.shard import mixed_precision
from fsdp_qlora.plan.layout import ROW_WEIGHTS, row_range
from fsdp_qlora.quant.formats import to_rows

WIDTH, NUM_BLOCKS, NUM_ROWS = 1024, 4, 8  # NUM_ROWS: examples in the batch, over all ranks
FORMAT = QuantFormat("nf4", double_quant=False)  # with True the ranks must also agree on the mean of absmax


class Block(nn.Module):
    """A frozen 4-bit linear with a trainable low-rank pair beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = QuantLinear(WIDTH, WIDTH, FORMAT)  # on meta
        self.a, self.b = nn.Linear(WIDTH, 8, bias=False), nn.Linear(8, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Keep the shape of ``x``, ``[rows, WIDTH]``."""
        return x + F.gelu(self.frozen(x) + self.b(self.a(x)))


def read_weights(layer: int, first: int, last: int) -> torch.Tensor:
    """Return rows of a weight's packed layout; yours come from a file, by byte range. Here each is drawn by seed."""
    generators = [torch.Generator().manual_seed(1000 * layer + row) for row in range(first, last)]
    drawn = [torch.randn(ROW_WEIGHTS, generator=generator) / WIDTH**0.5 for generator in generators]
    return torch.cat(drawn) if drawn else torch.empty(0)


def fill(layer: QuantLinear, number: int, ranks: Ranks) -> int:
    """Quantize this rank's rows into its shard; return the bytes they take."""
    layer.to_empty(device=ranks.device)
    first, last = row_range(layer.packed.shape[0], ranks.shard_rank, ranks.shard_size)
    codes, absmax = FORMAT.quantize_blocks(read_weights(number, first, last))
    layer.fill(to_rows(FORMAT, codes, absmax, None, last - first))
    return sum(p.to_local().nbytes for p in layer.parameters())


def train(ranks: Ranks) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(NUM_BLOCKS)))
    shard_model(model, [[block] for block in model], ranks, mixed_precision("bf16"))
    frozen = sum(fill(block.frozen, number, ranks) for number, block in enumerate(model))
    trained = [p for p in model.parameters() if p.requires_grad]
    sizes = gather_json([frozen, sum(p.to_local().nbytes for p in trained)], ranks)
    x, target = torch.randn(2, NUM_ROWS, WIDTH)[:, ranks.rank :: ranks.size]  # this rank's examples
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    losses = []
    for _ in range(2):
        # shard_model makes FSDP add gradients, not average them: divide by the global count yourself.
        loss = (model(x).float() - target).square().sum() / (NUM_ROWS * WIDTH)
        losses += all_sum([loss.item()], ranks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if ranks.is_main:
        print(f"all frozen weights in bfloat16: {2 * NUM_BLOCKS * WIDTH**2:,} bytes")
        for rank, (packed, small) in enumerate(sizes):
            print(f"rank {rank}: {packed:,} bytes frozen in 4-bit, {small:,} bytes trainable")
        print(f"loss {losses[0]:.4f}, after one step {losses[1]:.4f}")


if __name__ == "__main__":
    device = torch.device("cpu")
    with process_group(device, Placement.from_env(), timeout_seconds=60) as group:
        train(build_ranks(group, device))
