"""The bytes that a plan counts: by kind, by moment of a step, and in host memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import prod

from fsdp_qlora.adapters.saved import Kept


@dataclass(frozen=True)
class AdapterCost:
    """What adapters cost beyond their trained tensors."""

    fixed: int = 0
    """Bytes of tensors that are never trained; every rank holds them whole."""
    kept: tuple[Kept, ...] = ()
    """What each adapter of a decoder layer keeps from forward to backward (the largest layer's)."""
    no_input: frozenset[str] = frozenset()
    """Linears whose adapters do not keep the linear's input."""
    loading: int = 0
    """Bytes on a rank's device, while the model is loaded, for finding where adapters start."""
    beside: Mapping[str, Kept] = field(default_factory=dict)
    """What each adapter outside the decoder layers keeps from forward to backward, by its linear's name."""
    rows: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """The trained rows of added tokens, name in PEFT's file -> shape; every rank holds them whole."""

    @property
    def added(self) -> int:
        """Number of added tokens."""
        return max((count for count, _ in self.rows.values()), default=0)

    @property
    def row_elements(self) -> int:
        """Number of elements in the rows of added tokens."""
        return sum(map(prod, self.rows.values()))

    @property
    def kept_by_head(self) -> int:
        """Numbers that the head keeps of a token for the rows' gradient: its input, the derivatives by their logits."""
        return max((count + hidden for count, hidden in self.rows.values()), default=0)


@dataclass(frozen=True)
class BytesPerRank:
    """Bytes on the rank that holds most, each kind at its own peak."""

    base_packed: int
    base_statistics: int
    base_kept: int
    base_dense: int
    """Dense copies of quantized weights that are kept from step to step."""
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    gather: int

    @property
    def total(self) -> int:
        """Sum of all kinds: an upper bound, since they do not peak together."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class HostBytes:
    """Bytes of host memory that a rank needs, besides about 1 GB for Python and its libraries."""

    loading: int
    """During loading: the largest slice of a tensor that this rank reads."""
    offloaded_parameters: int
    offloaded_activations: int

    @property
    def total(self) -> int:
        """Sum of all of them."""
        return self.loading + self.in_step

    @property
    def in_step(self) -> int:
        """Bytes during training."""
        return self.offloaded_parameters + self.offloaded_activations


@dataclass(frozen=True)
class MemoryPlan:
    """The memory a rank needs."""

    bytes: BytesPerRank
    moments: dict[str, int]
    """Bytes on the device at each of the four moments of a step, while loading if adapters start there, and while
    images are read if the model reads any."""
    host: HostBytes

    @property
    def peak(self) -> int:
        """Peak bytes of tensors on the device."""
        return max(self.moments.values())


@dataclass(frozen=True)
class Unit:
    """An FSDP unit."""

    name: str
    gathered: int
    """Bytes of its parameters once gathered."""
    adapters: int
    """Number of elements in its adapters."""
