"""Small reductions and exchanges between ranks. Every function is a collective: all ranks must call it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.errors import attempt, raise_alike

_T = TypeVar("_T")


def all_sum(values: Sequence[float | torch.Tensor] | torch.Tensor, ranks: Ranks) -> list[float]:
    """Return the element-wise sums of ``values`` over all ranks, computed in float64.

    Waits for the device once; scalars that are on it already, ``[]``, stay there until they are summed.
    """
    if isinstance(values, torch.Tensor):
        tensor = values.to(ranks.device, torch.float64)
    else:
        tensor = torch.stack([_scalar(value, ranks.device) for value in values])
    dist.all_reduce(tensor, group=ranks.group)
    return tensor.tolist()


def _scalar(value: float | torch.Tensor, device: torch.device) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.detach().to(device, torch.float64, non_blocking=True)
    return torch.full((), value, dtype=torch.float64, device=device)  # a copy from the host would wait for the device


def all_max(value: float, ranks: Ranks) -> float:
    """Return the maximum of ``value`` over all ranks."""
    tensor = torch.tensor([value], dtype=torch.float64, device=ranks.device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=ranks.group)
    return tensor.item()


def any_rank(flag: bool, ranks: Ranks) -> bool:
    """Return whether ``flag`` is true on any rank, so that a signal to one rank becomes a decision of all."""
    return all_max(float(flag), ranks) > 0


def gather_json(value: Any, ranks: Ranks) -> list[Any]:
    """Return every rank's ``value`` (anything representable in JSON), in rank order.

    Sends JSON, because `all_gather_object` unpickles what other ranks send.
    """
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(ranks.device)
    sizes = all_gather(torch.tensor([data.numel()], device=ranks.device), ranks.group)
    longest = max(int(size.item()) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8, device=ranks.device)
    padded[: data.numel()] = data
    parts = all_gather(padded, ranks.group)
    return [json.loads(bytes(p[: int(n.item())].tolist())) for p, n in zip(parts, sizes, strict=True)]


def on_main(work: Callable[[], Any], ranks: Ranks) -> Any:
    """Run ``work`` on rank 0 only; every rank returns its result (anything representable in JSON) or raises its error.

    Raises:
        FsdpQloraError: identically on every rank, with rank 0's message and exit code; an `OSError` becomes code 74.
    """
    verdict: dict[str, Any] = {}
    if ranks.is_main:
        with ranks.phases.by_itself():
            result, verdict = attempt(work)
        verdict = verdict or {"result": result}
    verdict = gather_json(verdict, ranks)[0]
    raise_alike(verdict)
    return verdict["result"]


def on_every(work: Callable[[], _T], ranks: Ranks) -> _T:
    """Run ``work`` on every rank; each returns its own result, or all raise the error of the first failing rank.

    Raises:
        FsdpQloraError: identically on every rank, with that rank's message and exit code; an `OSError` becomes code 74.
    """
    with ranks.phases.by_itself():
        result, verdict = attempt(work)
    if any_rank(bool(verdict), ranks):
        verdicts = gather_json(verdict, ranks)
        rank = next(rank for rank, verdict in enumerate(verdicts) if verdict)
        where = f"rank {rank}: " if not all(verdicts) else ""
        raise_alike({**verdicts[rank], "message": where + verdicts[rank]["message"]})
    return cast(_T, result)


def all_gather(tensor: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """Return every rank's ``tensor``; shapes and dtypes must match."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return parts


def from_main(data: bytes, ranks: Ranks) -> bytes:
    """Return rank 0's ``data`` on every rank."""
    own = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8).to(ranks.device)
    size = torch.tensor([len(data)], device=ranks.device)
    dist.broadcast(size, group_src=0, group=ranks.group)
    sent = own[: len(data)] if ranks.is_main else torch.empty(int(size), dtype=torch.uint8, device=ranks.device)
    dist.broadcast(sent, group_src=0, group=ranks.group)
    return sent.cpu().numpy().tobytes()


def barrier(ranks: Ranks) -> None:
    """Wait until every rank has called this."""
    all_sum([0.0], ranks)
