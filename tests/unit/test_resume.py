"""What a resumed run says of the checkpoint that it goes on from, or of its absence."""

from __future__ import annotations

from pathlib import Path

import pytest

from fsdp_qlora.checkpoint.manifest import compare
from fsdp_qlora.checkpoint.resume import identity_of
from fsdp_qlora.config.convert import to_dict
from fsdp_qlora.config.schema import from_dict
from fsdp_qlora.errors import ConfigError


def _identity(lr: float, digest: str, repairs: tuple[str, ...] = ()) -> dict:
    return identity_of(to_dict(from_dict({"optim": {"lr": lr}})), {"model.safetensors": digest}, "rows", repairs)


@pytest.mark.parametrize(("now", "overrides"), [
    (_identity(2.0, "a"), "checkpoint.resume_overrides=[optim.lr]"),
    (_identity(1.0, "b"), None),
    (_identity(1.0, "a", ("buffers of the files are loaded",)), None),
    (_identity(2.0, "b"), None),  # the learning rate alone would not be enough
])  # fmt: skip
def test_overrides_are_suggested_only_where_they_help(now, overrides):
    with pytest.raises(ConfigError) as refused:
        compare(_identity(1.0, "a"), now, Path("step_00000002"))
    said = str(refused.value)
    assert (overrides in said) if overrides else ("resume_overrides" not in said and "base model" in said), said
