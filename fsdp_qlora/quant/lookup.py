"""Quantize bfloat16 weights to NF4 by table lookup on CPUs: bit-identical to bitsandbytes, in a fraction of the time.

bitsandbytes' op divides each weight by its block's absmax and searches 15 bounds. Here both are bfloat16, and scaling
both by a power of two leaves the quotient unchanged. So the code depends only on the absmax's 7-bit mantissa and on the
weight's sign, mantissa and exponent relative to the absmax: 393,216 cases, tabulated once with bitsandbytes' own op.
NF4 only: FP4 has two codes for zero.

    bfloat16:    sign (1 bit) | exponent (8 bits) | mantissa (7 bits)        e, m: exponent and mantissa fields

    index  =  m(absmax) * 3,072  +  negative * 1,536  +  (11 + e(weight) - e(absmax)) * 128  +  m(weight)
              128 mantissas         2 signs              12 exponents, 0 to 11                  128 mantissas
                                                         '-- clamped to 0 as a whole: code of zero --------'
"""

from __future__ import annotations

from functools import cache

import torch

from fsdp_qlora.errors import NumericsError

_MANTISSAS = 128
_EXPONENTS = 11
"""How many exponents below its absmax a weight may lie; smaller weights get the code of zero."""
_PER_SIGN = (_EXPONENTS + 1) * _MANTISSAS
_EXPONENT_BITS = 0x7F80
_LOWEST, _HIGHEST = _EXPONENTS + 1 << 7, 252 << 7
"""Range of absmax bit patterns that the table covers: from `_LOWEST` on, subnormal weights quantize to zero; below
`_HIGHEST`, the reciprocal is normal."""


def quantize_nf4(weights: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the codes of whole blocks, uint8 ``[n / 2]``, and their absmax, float32 ``[n / block_size]``.

    Returns None if any block's absmax is near the ends of bfloat16's range, infinite or NaN.

    Args:
        weights: bfloat16 ``[n]`` on a CPU; ``n`` is a multiple of ``block_size``.
        block_size: number of weights in a block.
    """
    bits = weights.view(torch.int16).view(-1, block_size)
    place = bits & 0x7FFF  # without the sign, bit patterns sort as magnitudes do, so amax finds the absmax
    absmax = place.amax(1, keepdim=True)
    if bool(((absmax > 0) & (absmax < _LOWEST)).any()) or int(absmax.max()) >= _HIGHEST:
        return None
    # Subtracting absmax's exponent field, less 11, leaves the relative exponent and the weight's mantissa. An all-zero
    # block subtracts the maximum, so it clamps to 0. `bits >> 15` is -1 for negative weights, which masks in _PER_SIGN.
    least = torch.where(absmax > 0, (absmax & _EXPONENT_BITS) - _EXPONENTS * _MANTISSAS, 0x7FFF)
    place.sub_(least).clamp_(min=0).add_((bits >> 15).bitwise_and_(_PER_SIGN))
    rows = (absmax & (_MANTISSAS - 1)).int().mul_(2 * _PER_SIGN)
    codes = _table().index_select(0, (place + rows).view(-1))
    # Little-endian: the first code of a pair is the low byte. It becomes the high nibble, the second code the low one.
    pairs = codes.view(torch.int16)
    return ((pairs << 4) | (pairs >> 8)).to(torch.uint8), absmax.view(torch.bfloat16).float().view(-1)


@cache
def _table() -> torch.Tensor:
    """Return the uint8 codes in the order of the module's drawing, quantized by bitsandbytes in blocks of 64.

    Each block starts with its absmax, to fix the scale; the other 63 weights are table entries. Entries that exceed
    the absmax never occur as weights; they are clamped so that they do not change the scale.
    """
    own = 64 - 1  # table entries in a block
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
        raise NumericsError("nf4: small weights do not get the code of zero in this version of bitsandbytes.")
    return codes.reshape(-1).contiguous()
