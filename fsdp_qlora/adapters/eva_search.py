"""EVA on a sharded base: the ranks run a micro-batch each, and share the decompositions of what goes into the targets.

Every rank keeps the inputs of its micro-batch in host memory. They are then taken in the order of the micro-batches:
the rank that ran one sends each input to the rank whose work it is, which updates its directions, on one thread if on a
CPU. After each micro-batch all ranks know what the directions explain and which have settled. So no bit depends on the
number of ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice

import torch
import torch.distributed as dist
from torch import nn

from fsdp_qlora.adapters.eva import Directions, divide, most
from fsdp_qlora.adapters.method import of_target
from fsdp_qlora.adapters.names import IN_FILE, LORA_A
from fsdp_qlora.config.schema import LoraSettings
from fsdp_qlora.data.labels import IGNORE
from fsdp_qlora.data.loader import MicroBatch, TokenBatch
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.reduce import gather_json, on_main
from fsdp_qlora.distributed.shards import HOST
from fsdp_qlora.errors import NumericsError
from fsdp_qlora.quant.formats import one_thread
from fsdp_qlora.quant.packing import raw_bytes

LIMIT = 1000
"""Micro-batches after which directions that have not settled never will."""
_STARVED = 50
"""Micro-batches after which an input that never had enough tokens never will."""

Run = Callable[[MicroBatch], object]
"""Runs the base on a micro-batch, on the ranks' device. A collective."""


class Inputs:
    """Keeps what goes into the targets: the rows of supervised tokens, in host memory."""

    def __init__(self, base: nn.Module, targets: Sequence[str]) -> None:
        self.base, self.targets = base, targets
        self._mask = torch.zeros(0)
        self._kept: dict[str, list[torch.Tensor]] = {}
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    def of(self, micro_batch: MicroBatch, run: Run) -> dict[str, torch.Tensor]:
        """Return target -> ``[tokens, features]`` for a micro-batch, in the order of the tokens."""
        assert isinstance(micro_batch, TokenBatch)
        self._mask, self._kept, self._last = micro_batch.labels != IGNORE, {}, None
        handles = [self.base.get_submodule(name).register_forward_pre_hook(self._keep(name)) for name in self.targets]
        try:
            run(micro_batch)
        finally:
            for handle in handles:
                handle.remove()
        self._last = None
        return {name: parts[0] if len(parts) == 1 else torch.cat(parts) for name, parts in self._kept.items()}

    def _keep(self, name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0]
            if self._last is None or self._last[0] is not x:  # queries, keys and values read the same tensor
                self._last = x, self._supervised(x).to(HOST)
            self._kept.setdefault(name, []).append(self._last[1])

        return hook

    def _supervised(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.detach().reshape(-1, x.shape[-1])
        if len(rows) != self._mask.numel():  # tokens that were sorted by expert, or chosen in another way
            return rows.clone()
        return rows[self._mask.flatten().to(rows.device)]


class Search:
    """Finds the directions of all targets and divides the ranks among them."""

    def __init__(self, base: nn.Module, features: Mapping[str, int], lora: LoraSettings, ranks: Ranks) -> None:
        """Prepare the search.

        Args:
            base: the sharded base model, without adapters.
            features: target -> number of its input's features.
            lora: the settings, with whole names for patterns.
            ranks: the ranks that hold the model.
        """
        order = [name for name, _ in base.named_modules() if name in features]
        self.inputs, self.features, self.lora, self.ranks = Inputs(base, order), features, lora, ranks
        self.budget = sum(of_target(lora, name).r for name in order)
        self.leader: dict[str, str] = {}
        self.counts: dict[str, int] = {}
        self.divided: dict[str, int] = {}
        self._own: dict[str, Directions] = {}
        self._owner: dict[str, int] = {}
        self._explained: dict[str, torch.Tensor] = {}
        self._settled: dict[str, torch.Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._done: set[str] = set()

    @torch.no_grad()
    def run(self, micro_batches: Iterator[MicroBatch], run: Run) -> int:
        """Search until all directions that got a rank have settled; return the number of micro-batches it took.

        A collective. ``micro_batches`` never ends, and is the same on every rank.

        Raises:
            NumericsError: identically on every rank, if an input cannot be decomposed, or directions do not settle.
        """
        number, ranks = 0, self.ranks
        while number < LIMIT:
            own = next(islice(micro_batches, ranks.rank, ranks.rank + 1))
            for _ in islice(micro_batches, ranks.size - 1 - ranks.rank):
                pass
            with one_thread():
                kept = self.inputs.of(own.to(ranks.device), run)
            if not self.leader:
                self._group(kept)
            for turn in range(ranks.size):
                if self._all_settled():
                    return number
                if number == LIMIT:
                    break
                self._take(turn, kept)
                number += 1
                if self._explained.keys() == self.counts.keys():
                    self.divided.update(divide({n: self._explained[n] for n in self.counts}, self.leader, self.budget))
                elif number >= _STARVED:
                    self._raise_starved(number)
            ranks.phases.sign()
        raise NumericsError(
            f"lora.init_lora_weights: eva's directions have not settled after {number} micro-batches: those of "
            f"{next(name for name in self.counts if name not in self._done)} still turn. Lower lora.eva_tau "
            f"({self.lora.eva_tau}), or raise train.micro_batch_size."
        )

    def _group(self, kept: Mapping[str, torch.Tensor]) -> None:
        """Find the targets that share an input in the first micro-batch, and deal these to the ranks."""
        self.leader = on_main(lambda: _leaders(kept, self.inputs.targets), self.ranks)
        for name, first in self.leader.items():
            self.counts[first] = max(self.counts.get(first, 0), most(self.lora, name))
        self.divided = {name: self.counts[first] for name, first in self.leader.items()}
        work = [0] * self.ranks.size
        for name in sorted(self.counts, key=lambda name: -self.features[name]):
            self._owner[name] = work.index(min(work))
            work[self._owner[name]] += self.features[name]
        self._own = {
            name: Directions(n, self.lora.eva_tau)
            for name, n in self.counts.items()
            if self._owner[name] == self.ranks.rank
        }
        self._settled = {name: torch.zeros(n, dtype=torch.bool) for name, n in self.counts.items()}

    def _all_settled(self) -> bool:
        for name in self.counts:
            if bool(self._settled[name][: self.divided[name]].all()):
                self._done.add(name)
            else:
                self._done.discard(name)
        return len(self._done) == len(self.counts)

    def _take(self, turn: int, kept: Mapping[str, torch.Tensor]) -> None:
        """Update the directions that have not settled with the micro-batch that rank ``turn`` ran, and tell all."""
        device, group, rank = self.ranks.device, self.ranks.group, self.ranks.rank
        names = list(self.counts)
        sizes = torch.tensor([len(kept[name]) if name in kept else 0 for name in names], device=device)
        dist.broadcast(sizes, group_src=turn, group=group)
        width = max(self.counts.values())
        table, failed = torch.zeros(len(names), 2 * width + 1, dtype=torch.float64, device=device), ""
        for place, (name, size) in enumerate(zip(names, sizes.tolist(), strict=True)):
            self._tokens[name] = max(self._tokens.get(name, 0), size)
            owner = self._owner[name]
            enough = size >= self.counts[name]
            if rank in (turn, owner) and enough and name not in self._done:
                rows = kept[name].to(device, torch.float32).contiguous() if rank == turn else None
                if rows is None:
                    rows = torch.empty(size, self.features[name], device=device)
                    dist.recv(rows, group_src=turn, group=group)
                elif rank != owner:
                    dist.send(rows, group_dst=owner, group=group)
                if rank == owner and not failed:
                    failed = self._update(name, rows)
            if rank == owner and (enough or name in self._explained) and not failed:
                self._fill(table[place], self._own[name], width)
        self._tell(table, width, failed)

    def _update(self, name: str, rows: torch.Tensor) -> str:
        """Update a target's directions; return what is wrong with its input, if anything."""
        try:
            with one_thread():
                self._own[name].add(rows)
        except NumericsError as error:
            return f"the input of {name} {error}"
        return ""

    def _fill(self, line: torch.Tensor, own: Directions, width: int) -> None:
        line[0] = 1
        line[1 : 1 + own.count] = own.explained
        line[1 + width : 1 + width + own.count] = own.settled.to(line)

    def _tell(self, table: torch.Tensor, width: int, failed: str) -> None:
        """Tell every rank what the directions explain and which have settled."""
        failures = [text for text in gather_json(failed, self.ranks) if text]
        if failures:
            raise NumericsError(f"lora.init_lora_weights: eva: {failures[0]}.")
        dist.all_reduce(table, group=self.ranks.group)  # each line is one rank's, and zero on the others
        for line, (name, n) in zip(table.to(HOST), self.counts.items(), strict=True):
            if line[0] > 0:
                self._explained[name] = line[1 : 1 + n]
                self._settled[name] = line[1 + width : 1 + width + n] > 0

    def _raise_starved(self, number: int) -> None:
        name = next(name for name in self.counts if name not in self._explained)
        raise NumericsError(
            f"lora.init_lora_weights: eva looks for {self.counts[name]} directions in the input of {name}, and needs "
            f"as many supervised tokens in a micro-batch; the {number} first gave it {self._tokens[name]} at most. "
            "Raise train.micro_batch_size (or set data.packing=true), or lower lora.r or lora.eva_rho."
        )

    @torch.no_grad()
    def collect(self) -> dict[str, torch.Tensor]:
        """Return A of every target that got a rank, by its name in PEFT's file, on rank 0; nothing on the others.

        A collective. They are float32 ``[r, features]`` in host memory.
        """
        device, group, rank = self.ranks.device, self.ranks.group, self.ranks.rank
        starts: dict[str, torch.Tensor] = {}
        for first in self.counts:
            followers = [name for name, leader in self.leader.items() if leader == first and self.divided[name]]
            r, owner = self.divided[first], self._owner[first]
            if not r:  # the leader has the highest
                continue
            rows = torch.empty(0)
            if rank == owner:
                rows = self._own[first].first(r, self.lora.eva_whiten).contiguous()
                if owner != 0:
                    dist.send(rows, group_dst=0, group=group)
            elif rank == 0:
                rows = torch.empty(r, self.features[first], device=device)
                dist.recv(rows, group_src=owner, group=group)
            if rank == 0:
                for name in followers:
                    starts[f"{IN_FILE}{name}{LORA_A}"] = rows[: self.divided[name]].to(HOST, copy=True).contiguous()
        return starts


def _leaders(kept: Mapping[str, torch.Tensor], targets: Sequence[str]) -> dict[str, str]:
    """Return target -> the first target with an equal input; one without an input leads itself."""
    digests = {name: hashlib.sha256(raw_bytes(x.contiguous()).numpy().data).digest() for name, x in kept.items()}
    first: dict[bytes, str] = {}
    return {name: first.setdefault(digests.get(name, name.encode()), name) for name in targets}
