"""EVA (https://arxiv.org/abs/2410.07170): LoRA's A starts from the principal directions of each linear's input.

The directions are found by an incremental SVD over the inputs that the base computes for training rows, and the ranks
are divided anew among the linears, in proportion to how much of its input's variance each direction explains. B is
zero, so the base stays as it is, and an adapter that is given away is a plain LoRA with PEFT's ``rank_pattern`` and
``alpha_pattern``.

This is what `peft.initialize_lora_eva_weights` computes, operation for operation, for one linear and one batch at a
time; `fsdp_qlora.run.eva` runs it on a sharded base. PEFT's `IncrementalPCA` is not in its documentation: only this
module uses it, and `tests/unit/test_eva.py` fails if it changes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from peft.utils.incremental_pca import IncrementalPCA
from torch import nn

from fsdp_qlora.adapters.method import of_target
from fsdp_qlora.config.schema import LoraSettings
from fsdp_qlora.errors import NumericsError, PlanError
from fsdp_qlora.shapes.linears import FLOAT32, LinearShape

_SEED = 42
"""PEFT's seed of the randomized SVD of every batch."""
_ITERATIONS = 4
"""Its power iterations."""


class Directions:
    """The principal directions of one input, updated batch by batch."""

    def __init__(self, count: int, tau: float) -> None:
        """Prepare ``count`` directions; one has settled if its cosine with the one before is at least ``tau``."""
        self.count, self.tau = count, tau
        self.settled = torch.zeros(count, dtype=torch.bool)
        self._pca = IncrementalPCA(n_components=count, copy=True, lowrank=True, lowrank_seed=_SEED)

    def add(self, rows: torch.Tensor) -> None:
        """Update them with float32 rows ``[tokens, features]``, at least ``count`` of them.

        Raises:
            NumericsError: if the rows are not finite, or all the same.
        """
        before = getattr(self._pca, "components_", None)
        try:
            self._pca.partial_fit(rows)
        except torch.linalg.LinAlgError as error:  # type: ignore[reportPrivateImportUsage]
            raise NumericsError(f"has no decomposition: {error}") from error
        if not bool(torch.isfinite(self.explained).all()):
            raise NumericsError("is not finite, or the same for all tokens")
        if before is not None:
            self.settled = (nn.functional.cosine_similarity(self._pca.components_, before) >= self.tau).cpu()

    @property
    def explained(self) -> torch.Tensor:
        """The share of the input's variance that each direction explains, ``[count]``."""
        return self._pca.explained_variance_ratio_

    def first(self, r: int, whiten: bool) -> torch.Tensor:
        """Return the first ``r`` directions, float32 ``[r, features]``, over the roots of their singular values or not.

        PEFT divides the directions of linears that share an input once for each of them; here they are divided once.
        """
        chosen = self._pca.components_[:r]  # float64 from the second batch on, whose mean is
        return (chosen / self._pca.singular_values_[:r].sqrt().reshape(-1, 1) if whiten else chosen).float()


def most(lora: LoraSettings, target: str) -> int:
    """Return the largest rank that a target can get."""
    return round(of_target(lora, target).r * lora.eva_rho)


def divide(explained: Mapping[str, torch.Tensor], leader: Mapping[str, str], budget: int) -> dict[str, int]:
    """Divide ``budget`` ranks among the targets: one for each of the directions that explain the most.

    Args:
        explained: `Directions.explained` of each leader.
        leader: target -> the first of those that share its input, in the model's order.
        budget: the sum of all ranks.
    """
    followers = [name for name, first in leader.items() if name != first]
    grouped = [name for first in explained for name in followers if leader[name] == first]
    shares = [(name, share) for name in (*explained, *grouped) for share in explained[leader[name]]]
    # Linears with one input have equal shares: which of them comes first is what PEFT's sort makes of it, on a CPU.
    largest = torch.stack([share for _, share in shares]).argsort(descending=True)[:budget]
    ranks = Counter(shares[int(i)][0] for i in largest)
    divided = {name: ranks.get(name, 0) for name in (*explained, *grouped)}
    for name in grouped:  # the leader gets the highest rank of those that share its input
        first = leader[name]
        divided[first], divided[name] = max(divided[first], divided[name]), min(divided[first], divided[name])
    return divided


def bounded(lora: LoraSettings, targets: Sequence[LinearShape]) -> LoraSettings:
    """Return the settings of a plain LoRA whose ranks are the largest that the targets can get.

    Raises:
        PlanError: if a target is too small for its rank.
    """
    for linear in targets:
        if (r := most(lora, linear.name)) > linear.in_features:
            raise PlanError(
                f"lora.init_lora_weights: eva looks for {r} directions (lora.r times lora.eva_rho) in the input of "
                f"{linear.name}, which has {linear.in_features} features; lower lora.r or lora.eva_rho, or leave it "
                "out with lora.exclude_modules."
            )
    return _plain(lora, {linear.name: most(lora, linear.name) for linear in targets})


def settled(lora: LoraSettings, ranks: Mapping[str, int]) -> LoraSettings:
    """Return the settings of the plain LoRA that starts: of these ranks, without the targets that got none."""
    return replace(
        _plain(lora, ranks),
        target_modules=[name for name, r in ranks.items() if r], exclude_modules=[], layers_to_transform=[],
    )  # fmt: skip


def _plain(lora: LoraSettings, ranks: Mapping[str, int]) -> LoraSettings:
    unset, alphas = LoraSettings(), {}
    for name, r in ranks.items():
        own = of_target(lora, name)
        alphas[name] = own.alpha * (r / own.r) if lora.eva_adjust_scaling_factors and r != own.r else own.alpha
    return replace(
        lora, variant=lora.method, init_lora_weights=None, eva_rho=unset.eva_rho, eva_tau=unset.eva_tau,
        eva_whiten=unset.eva_whiten, eva_adjust_scaling_factors=unset.eva_adjust_scaling_factors,
        rank_pattern={name: r for name, r in ranks.items() if r not in (0, lora.r)},
        alpha_pattern={name: alpha for name, alpha in alphas.items() if ranks[name] and alpha != lora.alpha},
    )  # fmt: skip


def update_bytes(lora: LoraSettings, targets: Iterable[LinearShape], tokens: int) -> int:
    """Return the bytes of the largest update: the rows, stacked on what is known, twice, and both sides' sketches."""
    return max(
        FLOAT32 * (3 * (tokens + (n := most(lora, x.name)) + 1) * x.in_features + 8 * n * (tokens + x.in_features))
        for x in targets
    )


def update_operations(lora: LoraSettings, targets: Iterable[LinearShape], tokens: int) -> float:
    """Return the floating-point operations of an update of all targets, if none shares its input."""
    each = 2 * (2 * _ITERATIONS + 1)
    return sum(float(each * tokens * x.in_features * 2 * most(lora, x.name)) for x in targets)
