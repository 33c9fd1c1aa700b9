"""Shard a model of your own, without transformers: frozen 4-bit layers, small trainable ones, 2 ranks, one step.

    torchrun --nproc-per-node 2 examples/shard_own_model.py

The frozen layers start on the meta device; each rank then quantizes its own rows only, so no rank ever holds a whole
weight. The trainable parts are small: drawn alike on every rank, of which FSDP2 keeps a slice each.
"""

import torch
from torch import nn

from fsdp_qlora import (
    ROW_WEIGHTS,
    Placement,
    QuantLinear,
    Ranks,
    all_sum,
    build_format,
    build_ranks,
    gather_json,
    mixed_precision,
    process_group,
    row_range,
    shard_model,
    to_rows,
)

WIDTH, NUM_BLOCKS, BATCH = 1024, 4, 8  # BATCH: examples in a step, over all ranks
FORMAT = build_format("nf4", double_quant=False)  # with True the ranks must also agree on the mean of absmax


class Block(nn.Module):
    """A frozen 4-bit linear (on meta) with a trainable low-rank pair beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = QuantLinear(WIDTH, WIDTH, FORMAT)
        self.a, self.b = nn.Linear(WIDTH, 8, bias=False), nn.Linear(8, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Keep the shape of ``x``, ``[examples, WIDTH]``."""
        return x + torch.relu(self.frozen(x) + self.b(self.a(x)))


def fill(layer: QuantLinear, seed: int, ranks: Ranks) -> int:
    """Quantize this rank's rows into its shard; return the bytes they take."""
    layer.to_empty(device=ranks.device)
    first, last = row_range(layer.packed.shape[0], ranks.shard_rank, ranks.shard_size)
    # Yours come from a file: elements first * ROW_WEIGHTS to last * ROW_WEIGHTS. Here each row has a seed of its own.
    generators = [torch.Generator().manual_seed(1000 * seed + row) for row in range(first, last)]
    weights = torch.stack([torch.randn(ROW_WEIGHTS, generator=g) for g in generators]) / WIDTH**0.5
    codes, absmax = FORMAT.quantize_run(weights.flatten(), weights.shape[1])
    layer.fill(to_rows(FORMAT, codes, absmax, None, last - first))
    return sum(p.to_local().nbytes for p in layer.parameters())


def main(ranks: Ranks) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(NUM_BLOCKS)))
    shard_model(model, [[block] for block in model], ranks, mixed_precision("bf16"))
    frozen = sum(fill(block.frozen, number, ranks) for number, block in enumerate(model))
    trained = [p for p in model.parameters() if p.requires_grad]
    sizes = gather_json([frozen, sum(p.to_local().nbytes for p in trained)], ranks)
    x, target = torch.randn(2, BATCH, WIDTH)[:, ranks.rank :: ranks.size]  # this rank's examples
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-3), []
    for _ in range(2):
        # shard_model makes FSDP add gradients, not average them: divide by the count over all ranks yourself.
        loss = (model(x).float() - target).square().sum() / (BATCH * WIDTH)
        losses += all_sum([loss.item()], ranks)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if ranks.is_main:
        print(f"the frozen weights in bfloat16: {2 * NUM_BLOCKS * WIDTH**2:,} bytes")
        for rank, (packed, small) in enumerate(sizes):
            print(f"rank {rank} holds {packed:,} bytes of them in 4-bit, and {small:,} bytes trainable")
        print(f"loss {losses[0]:.4f}, after one step {losses[1]:.4f}")


if __name__ == "__main__":
    device = torch.device("cpu")
    with process_group(device, Placement.from_env(), timeout_seconds=60) as group:
        main(build_ranks(group, device))
