"""Parses amounts of memory such as ``24GiB``, and computes the reserve to keep free."""

from __future__ import annotations

import re

from fsdp_qlora.errors import ConfigError

_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_LEAST = 10**6


def parse_bytes(text: str, key: str = "plan.gpu") -> int:
    """Return the bytes of ``24GiB``, ``80GB`` or a plain number; ``key`` is the name of the setting.

    Raises:
        ConfigError: if ``text`` is none of these, or less than any device has: its unit was forgotten.
    """
    match = re.fullmatch(r"\s*([\d.]+)\s*([KMGT]I?)?B?\s*", text.upper())
    try:
        amount = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    except ValueError:
        amount = 0
    if amount >= _LEAST:
        return amount
    what = f"{amount} bytes are not the memory of a device" if amount else f"{text!r} is not an amount of memory"
    raise ConfigError(f"{key}: {what}; write it as 24GiB or 80GB.")


def reserve_bytes(peak: int, gpu: str | None) -> int:
    """Return the bytes reserved for the framework: the larger of 1.5 GiB and 6 % of the device (or of the peak)."""
    return max(int(1.5 * 2**30), int(0.06 * (parse_bytes(gpu) if gpu else peak)))
