"""`evaluate.json`: a place that cannot be written to is named before anything is measured."""

from __future__ import annotations

import pytest

from fsdp_qlora.cli.evaluate import run
from fsdp_qlora.config.schema import from_dict
from fsdp_qlora.errors import ConfigError


@pytest.mark.parametrize(
    ("place", "said"),
    [(".", "is a folder"), ("none/out.json", "there is no folder"), ("file/out.json", "there is no folder")],
)
def test_a_place_that_cannot_be_written_to_is_named_first(tmp_path, place, said):
    (tmp_path / "file").write_text("")
    settings = {"model": {"name": "none/such"}, "evaluate": {"json": str(tmp_path / place)}}
    with pytest.raises(ConfigError, match=rf"^evaluate\.json: .*{said}"):
        run(from_dict(settings))
