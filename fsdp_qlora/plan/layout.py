"""Chooses how many ranks share one copy of the base (``fsdp.shard_degree=auto``): one, those of a node, or all.

A smaller group gathers fewer bytes over faster links, and a single rank gathers nothing. A larger one leaves each rank
more memory, which `fsdp_qlora.plan.choices` spends on settings that save time. No number of a run depends on it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fsdp_qlora.config.auto import Choice, degree
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.plan.devices import INTERCONNECTS, Device, Interconnect
from fsdp_qlora.plan.plan import TrainPlan, make_plan
from fsdp_qlora.plan.timing import step_time
from fsdp_qlora.shapes.linears import ModelShapes

BETWEEN_NODES = INTERCONNECTS["infiniband_400g"]
"""Assumed between nodes, unless the link within a node is slower."""
ROOM = 0.9
"""Share of the budget that a smaller group may fill; what fits more tightly gains little and may not fit after all."""
_RECOMPUTING = ("none", "selective", "full")
"""Activation checkpointing, cheapest first."""


@dataclass(frozen=True)
class Cluster:
    """The ranks of a run and what is known about their devices."""

    world_size: int
    node_size: int
    """Ranks on a node."""
    budget: int
    """Bytes that a rank's tensors may take."""
    device: Device | None = None
    """Each rank's device, if its speed is known."""
    link: Interconnect | None = None
    """The link between ranks of a node."""

    @property
    def group_sizes(self) -> list[int]:
        """Numbers of ranks that may share one copy: one, those of a node, or all."""
        return sorted({size for size in (1, self.node_size, self.world_size) if self.world_size % size == 0})

    def budget_of(self, group_size: int) -> int:
        """Return the bytes that the plan of such a group may take."""
        return self.budget if group_size == self.world_size else int(ROOM * self.budget)

    def link_of(self, group_size: int) -> Interconnect | None:
        """Return the slowest link within a group of ranks."""
        return None if self.link is None else slowest_link(self.link, group_size, self.node_size)


def slowest_link(link: Interconnect, group_size: int, node_size: int) -> Interconnect:
    """Return the slowest link within a group of ranks; ``link`` connects those of a node."""
    return link if group_size <= node_size else min(link, BETWEEN_NODES, key=lambda link: link.rate)


def settle_shard_degree(config: RunConfig, shapes: ModelShapes, cluster: Cluster) -> tuple[RunConfig, Choice | None]:
    """Return the settings with both degrees as numbers, and the choice made, or None if none was asked for.

    Of the groups that fit, this takes the one with the shortest estimated step if the device is known. Otherwise it
    takes the smallest one of those that recompute the least. If none fits, all ranks share one copy.
    """
    if degree(config.fsdp.shard_degree) is not None:
        return config, None
    plans = {
        size: make_plan(_degrees(config, cluster, size), shapes, cluster.world_size, cluster.budget_of(size))
        for size in cluster.group_sizes
    }
    fitting = {size: plan for size, plan in plans.items() if plan.peak <= cluster.budget_of(size)}
    if not fitting:
        return _with(config, cluster, cluster.world_size, f"nothing fits in {cluster.budget / 1e9:.1f} GB")
    costs = {size: _cost(plan, shapes, config, cluster) for size, plan in fitting.items()}
    best = min(fitting, key=lambda size: (costs[size], size))
    return _with(config, cluster, best, _reason(best, plans, costs, cluster))


def _degrees(config: RunConfig, cluster: Cluster, size: int) -> RunConfig:
    copies = cluster.world_size // size
    return replace(config, fsdp=replace(config.fsdp, shard_degree=size, replicate_degree=copies))


def _with(config: RunConfig, cluster: Cluster, size: int, why: str) -> tuple[RunConfig, Choice]:
    return _degrees(config, cluster, size), Choice(str(size), why)


def _cost(plan: TrainPlan, shapes: ModelShapes, config: RunConfig, cluster: Cluster) -> float:
    link = cluster.link_of(plan.shard_size)
    if cluster.device is None or link is None:
        return _RECOMPUTING.index(plan.settings.checkpointing)
    return step_time(plan, shapes, cluster.device, link, config.fsdp.prefetch > 0).step_seconds


def _reason(best: int, plans: dict[int, TrainPlan], costs: dict[int, float], cluster: Cluster) -> str:
    what = "each rank keeps a whole copy, so nothing is gathered" if best == 1 else f"{best} ranks share one copy"
    used = max(0.1, plans[best].peak / 1e9)
    parts = [f"{what}, using {used:.1f} of {cluster.budget / 1e9:.1f} GB"]
    for size, plan in plans.items():
        if size == best:
            continue
        if size not in costs:
            parts.append(f"with {_ranks(size)}, {plan.peak / 1e9:.1f} GB would not fit with room")
        elif cluster.device is not None:
            parts.append(
                f"with {_ranks(size)} a step is estimated to take {costs[size] / costs[best]:.2f} times as long"
            )
        elif costs[size] > costs[best]:
            parts.append(f"{_ranks(size)} would need checkpointing {plan.settings.checkpointing}")
    return "; ".join(parts)


def _ranks(size: int) -> str:
    return "one rank" if size == 1 else f"{size} ranks"
