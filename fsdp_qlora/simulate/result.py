"""What a simulated step finds, as bytes, rows of a table and JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fsdp_qlora.plan.plan import TrainPlan
from fsdp_qlora.simulate.tracker import TensorBytes
from fsdp_qlora.track.console import megabytes

Places = dict[str, TensorBytes]


@dataclass(frozen=True)
class Simulation:
    """Memory of a simulated step on the fullest rank."""

    places: Places
    """The peak of the device's tensors at every place in the step."""
    host: Places | None
    """The peak of the tensors in host memory at every place; None on a CPU, whose memory is the host's."""
    depths: tuple[int, ...]
    """Numbers of layers that were simulated; a single entry if it was the whole model."""
    checked: float | None
    """Relative error of the peak, estimated by the checking depth; None for a whole model."""
    seconds: float

    @property
    def place(self) -> str:
        """Where in the step the highest peak is."""
        return highest(self.places)[0]

    @property
    def peak(self) -> TensorBytes:
        """Bytes of the tensors at the highest peak."""
        return highest(self.places)[1]

    @property
    def peak_bytes(self) -> int:
        """Bytes of the device's tensors at the peak."""
        return self.peak.total

    @property
    def host_peak(self) -> TensorBytes | None:
        """Bytes of the tensors in host memory at their highest peak; None on a CPU."""
        return None if self.host is None else highest(self.host)[1] if self.host else TensorBytes()

    @property
    def host_peak_bytes(self) -> int | None:
        """Sum of `host_peak`."""
        return None if self.host_peak is None else self.host_peak.total

    @property
    def how(self) -> str:
        """How the peak was found, in a few words."""
        if self.checked is None:
            return "the whole model"
        *cuts, last = self.depths
        depths = ", ".join(map(str, cuts))
        return f"extrapolated from {depths} layers, checked with {last}: at most {100 * self.checked:.2f} % off"

    def rows(self, plan: TrainPlan) -> list[tuple[str, str]]:
        """Return the planned and the simulated bytes side by side, as rows of a table."""
        found, planned = self.peak, plan.bytes
        base = planned.base_packed + planned.base_statistics + planned.base_kept + planned.base_dense + planned.adapters
        pairs = [
            ("base and adapters", base, found.parameters),
            ("gradients", planned.gradients, found.gradients),
            ("optimizer", planned.optimizer, found.optimizer),
            ("activations and logits", planned.activations + planned.logits, found.activations),
            ("gather", planned.gather, found.gather),
            ("peak per rank", plan.peak, found.total),
        ]
        if self.host_peak_bytes is not None:
            pairs.append(("host memory per rank", plan.host.in_step, self.host_peak_bytes))
        rows = [
            (f"simulated {what}", f"{megabytes(there)} (planned {megabytes(known)})") for what, known, there in pairs
        ]
        return [*rows, ("simulated peak is in", self.place), ("simulated", f"{self.how}, {self.seconds:.0f} s")]

    def to_dict(self) -> dict[str, object]:
        """Return what `plan.json=true` prints besides ``peak_simulated_bytes``."""
        return {
            "bytes": asdict(self.peak),
            "host_bytes": None if self.host_peak is None else asdict(self.host_peak),
            "host_peak_bytes": self.host_peak_bytes,
            "place": self.place,
            "layers": list(self.depths),
            "error": self.checked,
            "seconds": round(self.seconds, 1),
        }

    @staticmethod
    def from_values(values: Mapping[str, Any]) -> Simulation:
        """Return the simulation whose ``asdict`` went through JSON."""

        def places(of: Mapping[str, Any]) -> Places:
            return {name: TensorBytes(**counts) for name, counts in of.items()}

        host, depths = values["host"], tuple(values["depths"])
        return Simulation(
            places(values["places"]), None if host is None else places(host), depths, values["checked"],
            values["seconds"],
        )  # fmt: skip


def highest(places: Places) -> tuple[str, TensorBytes]:
    """Return the place with the highest peak, and that peak."""
    return max(places.items(), key=lambda item: item[1].total)
