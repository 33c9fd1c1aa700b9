"""Devices and interconnects by name: vendors' figures, and the shares of them that a plan assumes.

Peaks are dense bf16 matrix products with float32 sums, without sparsity (NVIDIA's Ampere, Ada, Hopper and Blackwell
whitepapers and data sheets, AMD's CDNA 3 data sheet). No card reaches its peak, and no link its nominal rate. The
shares assumed here are round figures, printed with every plan; a rate may be given instead of an interconnect's name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches

from fsdp_qlora.errors import ConfigError

MFU = 0.45
"""Share of the peak that the matrix products of a 4-bit base reach (dequantization is counted separately)."""
LINK_SHARE = 0.75
"""Share of an interconnect's nominal rate that a large all-gather reaches."""


@dataclass(frozen=True)
class Device:
    """An accelerator."""

    memory: str
    """As sold; cards sold with N GB have N GiB."""
    teraflops: float
    """Peak of dense bf16 matrix products, in 1e12 operations per second."""
    bandwidth: float
    """Memory bandwidth, in 1e9 bytes per second."""
    interconnect: str
    """The usual interconnect, a name in `INTERCONNECTS`."""
    host: float
    """Nominal rate to host memory, one way, in 1e9 bytes per second."""


@dataclass(frozen=True)
class Interconnect:
    """The link over which ranks exchange data."""

    name: str
    nominal: float
    """Nominal rate, one way and per device, in 1e9 bytes per second."""
    over_host_bus: bool
    """Whether it shares the bus to host memory."""

    @property
    def rate(self) -> float:
        """Bytes per second that a plan assumes."""
        return self.nominal * LINK_SHARE * 1e9


DEVICES = {
    "rtx3060": Device("12GiB", 25, 360, "pcie4_no_p2p", 32),
    "rtx3090": Device("24GiB", 71, 936, "pcie4_no_p2p", 32),
    "rtx4060ti": Device("16GiB", 44, 288, "pcie4_no_p2p", 16),
    "rtx4070ti": Device("12GiB", 80, 504, "pcie4_no_p2p", 32),
    "rtx4080": Device("16GiB", 97, 717, "pcie4_no_p2p", 32),
    "rtx4090": Device("24GiB", 165, 1008, "pcie4_no_p2p", 32),
    "rtx5090": Device("32GiB", 210, 1792, "pcie5_no_p2p", 64),
    "a6000": Device("48GiB", 155, 768, "pcie4", 32),
    "l4": Device("24GiB", 121, 300, "pcie4", 32),
    "l40s": Device("48GiB", 362, 864, "pcie4", 32),
    "a10g": Device("24GiB", 70, 600, "pcie4", 32),
    "a100_40": Device("40GiB", 312, 1555, "nvlink3", 32),
    "a100_80": Device("80GiB", 312, 2039, "nvlink3", 32),
    "h100": Device("80GiB", 989, 3350, "nvlink4", 64),
    "h200": Device("141GB", 989, 4800, "nvlink4", 64),
    "b200": Device("180GB", 2250, 8000, "nvlink5", 64),
    "mi300x": Device("192GB", 1307, 5300, "xgmi3", 64),
}

DRIVER_NAMES = {
    "NVIDIA GeForce RTX 3060": "rtx3060",
    "NVIDIA GeForce RTX 3090": "rtx3090",
    "NVIDIA GeForce RTX 4060 Ti": "rtx4060ti",
    "NVIDIA GeForce RTX 4070 Ti": "rtx4070ti",
    "NVIDIA GeForce RTX 4080": "rtx4080",
    "NVIDIA GeForce RTX 4090": "rtx4090",
    "NVIDIA GeForce RTX 5090": "rtx5090",
    "NVIDIA RTX A6000": "a6000",
    "NVIDIA L4": "l4",
    "NVIDIA L40S": "l40s",
    "NVIDIA A10G": "a10g",
    "NVIDIA A100-SXM4-40GB": "a100_40",
    "NVIDIA A100-PCIE-40GB": "a100_40",
    "NVIDIA A100-SXM4-80GB": "a100_80",
    "NVIDIA A100 80GB PCIe": "a100_80",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "AMD Instinct MI300X": "mi300x",
}
"""Device names exactly as drivers report them. Variants with other peaks are missing on purpose: laptop chips, the H100
on PCIe, parts of a card (MIG)."""

INTERCONNECTS = {
    x.name: x
    for x in (
        Interconnect("pcie3", 16, True),
        Interconnect("pcie4", 32, True),
        # without peer-to-peer, every byte goes to host memory and back over the same bus
        Interconnect("pcie4_no_p2p", 16, True),
        Interconnect("pcie5", 64, True),
        Interconnect("pcie5_no_p2p", 32, True),
        Interconnect("nvlink3", 300, False),
        Interconnect("nvlink4", 450, False),
        Interconnect("nvlink5", 900, False),
        Interconnect("xgmi3", 448, False),
        Interconnect("ethernet_100g", 12.5, False),
        Interconnect("infiniband_400g", 50, False),
    )
}


def find_device(name: str) -> Device:
    """Return the device of that name (``rtx4090``, ``RTX 4090``).

    Raises:
        ConfigError: if it is not known; the message lists the known ones.
    """
    key = re.sub(r"[\s-]+", "", name.lower())
    for known, device in DEVICES.items():
        if key.replace("_", "") == known.replace("_", ""):
            return device
    raise ConfigError(f"plan.device: {name!r} is unknown.{_nearest(key, list(DEVICES))}")


def device_of_driver(name: str) -> Device | None:
    """Return the device that a driver reports as ``name``, or None; a similar device's peaks would be wrong."""
    known = DRIVER_NAMES.get(name)
    return None if known is None else DEVICES[known]


def find_interconnect(name: str) -> Interconnect:
    """Return the interconnect of that name, or one with a rate such as ``12GB/s``, which is assumed in full.

    Raises:
        ConfigError: if it is neither; the message lists the known names.
    """
    if name in INTERCONNECTS:
        return INTERCONNECTS[name]
    match = re.fullmatch(r"([\d.]+)\s*([GM])B/s", name.strip(), re.IGNORECASE)
    try:
        rate = float(match[1]) * (1 if match[2].upper() == "G" else 1e-3) if match else 0.0
    except ValueError:
        rate = 0.0
    if rate <= 0:
        raise ConfigError(
            f"plan.interconnect: {name!r} is neither a rate (12GB/s) nor a known "
            f"name.{_nearest(name, list(INTERCONNECTS))}"
        )
    return Interconnect(name, rate / LINK_SHARE, False)


def _nearest(word: str, known: list[str]) -> str:
    close = get_close_matches(word, known, n=1)
    return (f" Did you mean {close[0]!r}?" if close else "") + f" Known names: {', '.join(known)}."
