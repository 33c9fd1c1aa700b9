"""Each image classifier of transformers is trained as upstream trains it, or refused by name."""

from __future__ import annotations

import pytest

from tests.image_families import verdicts, write_families

pytestmark = pytest.mark.full
EQUAL = {
    "vit", "dinov2", "swin", "swin, absolute positions", "deit", "dinov2_with_registers", "beit",
    "beit, relative positions", "data2vec-vision", "vit_msn", "ijepa", "swinv2", "hiera",
}  # fmt: skip


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_family_is_equal_or_refused(pool, tmp_path, num_ranks):
    said = pool.run(num_ranks, verdicts, str(write_families(tmp_path)))[0]
    print("\n".join(f"{name}: {what}" for name, what in said.items()))
    odd = {name: what for name, what in said.items() if what != "equal" and not what.startswith("refused (2): ")}
    assert not odd
    assert {name for name, what in said.items() if what == "equal"} >= EQUAL
