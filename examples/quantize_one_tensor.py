"""Quantize one tensor to 4 bits and back, compare it with bitsandbytes bit for bit, and cut it for 3 ranks.

    python examples/quantize_one_tensor.py

The layout: a row of `packed` holds 16,384 weights (256 blocks of 64), so any cut between rows falls on whole blocks. A
rank therefore quantizes just its own rows and gets the very bits that quantizing the whole tensor gives.
"""

import bitsandbytes.functional as bnb
import torch

from fsdp_qlora import ROW_WEIGHTS, build_format, dequantize, quantize, row_range

NUM_RANKS = 3


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same bytes."""
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def main() -> None:
    torch.set_num_threads(1)  # the mean that double quantization subtracts depends, in its last bit, on the threads
    torch.manual_seed(0)
    weight = torch.randn(576, 1000).to(torch.bfloat16)
    quant_format = build_format("nf4", double_quant=True)

    ours = quantize(weight, quant_format)
    print(f"weight   {tuple(weight.shape)} bfloat16: {weight.nbytes:,} bytes")
    parts = {"packed": ours.packed, "absmax": ours.absmax, "nested": ours.nested}
    for name, part in parts.items():
        print(f"{name:<8} {tuple(part.shape)} {part.dtype}: {part.nbytes:,} bytes")
    held = sum(part.nbytes for part in parts.values())
    print(f"together {8 * held / weight.numel():.3f} bits a weight (the last row is padded)")

    codes, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    mine = ours.packed.view(torch.uint8).reshape(-1)[: weight.numel() // 2]
    print(f"codes equal to bitsandbytes: {same(mine, codes)}")
    print(f"statistics equal to bitsandbytes: {same(ours.absmax.reshape(-1)[: state.absmax.numel()], state.absmax)}")

    back = dequantize(ours, quant_format, tuple(weight.shape), torch.bfloat16)
    print(f"dequantized equal to bitsandbytes: {same(back, bnb.dequantize_4bit(codes, state))}")
    print(f"mean error of a weight: {(back.float() - weight.float()).abs().mean():.4f}")

    rows = ours.packed.shape[0]
    for rank in range(NUM_RANKS):
        start, stop = row_range(rows, rank, NUM_RANKS)
        piece = weight.reshape(-1)[start * ROW_WEIGHTS : stop * ROW_WEIGHTS]
        own, _ = quant_format.quantize_run(piece, weight.shape[1])
        expected = ours.packed[start:stop].view(torch.uint8).reshape(-1)[: own.numel()]
        print(f"rank {rank}: rows {start} to {stop} of {rows}, {piece.numel():,} weights, equal: {same(own, expected)}")


if __name__ == "__main__":
    main()
