"""Whether this device quantizes to the bytes of a CPU: `python -m benchmarks.gpu.digests` prints a list as JSON.

A weight drawn on the CPU is quantized on both, in each format. Codes may differ where a weight lies midway between two
values to its last bit (tests/gpu/test_gpu.py says how many may).
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from typing import Any

from benchmarks.ranks import ROOT, TIME_IS_UP

SHAPE = (1024, 1024)
FORMATS = (("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False), ("int8", False))
"""Names, and whether statistics are quantized too."""


def digests(seconds: float) -> dict[str, Any]:
    """Return ``digests``, what `main` prints, or why there are none."""
    command = [sys.executable, "-m", "benchmarks.gpu.digests"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": TIME_IS_UP}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no word"])[-1]}
    return {"digests": json.loads(done.stdout.splitlines()[-1])}


def _compare(name: str, double_quant: bool, kind: str) -> dict[str, Any]:
    import torch

    from fsdp_qlora.quant.formats import build_format, quantize
    from fsdp_qlora.quant.packing import raw_bytes

    quant_format = build_format(name, double_quant)
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).mul(0.02).bfloat16()
    pair = [quantize(weight.to(device), quant_format) for device in (kind, "cpu")]
    parts = [
        torch.cat([raw_bytes(part).cpu() for part in (q.packed, q.absmax, q.nested) if part is not None]) for q in pair
    ]
    return {
        "format": f"{name}{' with double quantization' if double_quant else ''}",
        "bytes": parts[0].numel(), "differing": int((parts[0] != parts[1]).sum()),
        "sha256": hashlib.sha256(parts[0].numpy().data).hexdigest(),
    }  # fmt: skip


def main() -> None:
    """Compare all formats."""
    from fsdp_qlora.distributed.process import device_types

    kind = next(iter(device_types()))
    print(json.dumps([_compare(name, double, kind) for name, double in FORMATS]))


if __name__ == "__main__":
    main()
