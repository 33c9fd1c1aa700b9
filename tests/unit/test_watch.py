"""What a rank says that is stuck in its own work."""

from __future__ import annotations

from types import SimpleNamespace

from fsdp_qlora.distributed.phases import Phases
from fsdp_qlora.distributed.watch import Watch


def test_the_limit_of_a_ranks_own_work_is_told():
    ranks = SimpleNamespace(rank=1, size=1, phases=Phases(name="writing the adapter"), saving=Phases())
    watch = Watch(ranks, 10.0)
    watch._since = SimpleNamespace(unchanged=lambda *_: 7.2)
    assert watch._stuck() is None, "in no work of its own"
    with ranks.phases.by_itself():
        left = watch._stuck()
    assert left is not None and left.code == 74
    assert "'writing the adapter': no progress for 7 s" in left.message
    assert "The limit is 7 s, 70 % of launcher.timeout_seconds." in left.message
