"""NF4 codes of bfloat16 weights by a table, for CPUs: bit for bit those of bitsandbytes, in a fraction of the time.

bitsandbytes' op divides each weight by its block's absmax and searches 15 bounds. Both are bfloat16 here, and powers of
two drop out of a quotient, so a code depends on the absmax' 7 bits of mantissa and on the weight's sign, mantissa and
distance in exponent alone: 393,216 cases, of which a table is made by bitsandbytes' op itself. (FP4 has two zeros.)
"""

from __future__ import annotations

from functools import cache

import torch

from fsdp_qlora.errors import NumericsError

_MANTISSAS = 128
_EXPONENTS = 11
"""Of a weight below its block's absmax; smaller ones have the code of zero."""
_PER_SIGN = (_EXPONENTS + 1) * _MANTISSAS
_EXPONENT_BITS = 0x7F80
_LOWEST, _HIGHEST = _EXPONENTS + 1 << 7, 252 << 7
"""Range of absmax bit patterns that the table covers: from `_LOWEST` on subnormal weights quantize to zero; below
`_HIGHEST` the reciprocal is normal."""


def quantize_nf4(weights: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the codes of whole blocks, uint8 ``[n / 2]``, and their absmax, float32 ``[n / block_size]``.

    None where a block's absmax is nearly out of the range of numbers, or is not one.

    Args:
        weights: bfloat16 ``[n]`` on a CPU, a multiple of ``block_size``.
        block_size: weights of a block.
    """
    bits = weights.view(torch.int16).view(-1, block_size)
    place = bits & 0x7FFF
    absmax = place.amax(1, keepdim=True)
    if bool(((absmax > 0) & (absmax < _LOWEST)).any()) or int(absmax.max()) >= _HIGHEST:
        return None
    # the distance of the exponents, then the mantissa; where all weights are zero anything low does
    least = torch.where(absmax > 0, (absmax & _EXPONENT_BITS) - _EXPONENTS * _MANTISSAS, 0x7FFF)
    place.sub_(least).clamp_(min=0).add_((bits >> 15).bitwise_and_(_PER_SIGN))
    rows = (absmax & (_MANTISSAS - 1)).int().mul_(2 * _PER_SIGN)
    codes = _table().index_select(0, (place + rows).view(-1))
    pairs = codes.view(torch.int16)  # the first of two is the low byte, and becomes the high half of one
    return ((pairs << 4) | (pairs >> 8)).to(torch.uint8), absmax.view(torch.bfloat16).float().view(-1)


@cache
def _table() -> torch.Tensor:
    """Return the codes, uint8, by the absmax' mantissa, the sign, and what is left of exponent and mantissa."""
    own = 64 - 1  # weights of a block beside its absmax
    steps = torch.arange(_PER_SIGN)
    values = (1 + steps % _MANTISSAS / _MANTISSAS) * 2.0 ** (steps // _MANTISSAS - _EXPONENTS)
    values = torch.cat([values, -values, values.new_zeros(-2 * _PER_SIGN % own)])
    absmax = (1 + torch.arange(_MANTISSAS) / _MANTISSAS).view(-1, 1, 1)
    blocks = torch.cat(
        [absmax.expand(-1, len(values) // own, 1), values.view(1, -1, own).clamp(-absmax, absmax)], dim=2
    ).bfloat16()
    packed, _ = torch.ops.bitsandbytes.quantize_4bit.default(blocks, 64, "nf4", torch.uint8)
    pairs = packed.view(-1)
    codes = torch.stack([pairs >> 4, pairs & 15], dim=1).view(_MANTISSAS, -1, 64)[:, :, 1:]
    codes = codes.reshape(_MANTISSAS, -1)[:, : 2 * _PER_SIGN].reshape(_MANTISSAS, 2, -1, _MANTISSAS)
    zero = torch.ops.bitsandbytes.quantize_4bit.default(torch.zeros(64).bfloat16(), 64, "nf4", torch.uint8)[0]
    if not bool((codes[:, :, 0] == zero.view(-1)[0] & 15).all()):
        raise NumericsError("nf4: small weights have other codes than zero in this version of bitsandbytes.")
    return codes.reshape(-1).contiguous()
