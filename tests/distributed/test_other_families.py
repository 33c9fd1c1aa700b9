"""Each encoder-decoder, encoder and speech model of transformers is trained as upstream trains it, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.other_families import CLASSIFIERS, MASKED, SEQ2SEQ, verdicts, write_each

pytestmark = pytest.mark.full
TABLE = Path(__file__).parents[2] / "docs" / "families_by_objective.md"
TYPES = {"seq2seq": SEQ2SEQ, "masked_lm": MASKED, "sequence_classification": CLASSIFIERS}
EQUAL = {
    "seq2seq": {
        "bart", "encoder-decoder", "led", "longt5", "marian", "mbart", "mt5", "mvp", "pegasus", "plbart", "t5",
        "t5gemma2", "umt5", "whisper",
    },
    "sequence_classification": {
        "bert", "camembert", "deberta-v2", "distilbert", "electra", "modernbert", "mpnet", "roberta",
        "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl",
    },
    "masked_lm": {
        "bert", "camembert", "electra", "esm", "longformer", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta",
    },
}  # fmt: skip
"""Families that must be equal."""
AT_ONCE = 4
HEADER = """# Model families by objective

Written by `tests/distributed/test_other_families.py` (`make test-full`): a small model of each class that transformers
has for an objective, with random weights, trained here (float32, NF4, adapters on all linears) beside plain transformers and
PEFT on the same rows, padded together. *equal*: the loss within 1e-5 and every gradient within 1e-4, relative. *refused*: one
message before the first step, exit code 2. *not small*: no small model of this class could be made, so nothing was compared.
Causal language models are in [families.md](families.md), image classifiers in [objectives.md](objectives.md).
"""


def _all(pool: Any, folder: Path, objective: str) -> dict[str, str]:
    """Return what becomes of each model type of an objective."""
    lacking = write_each(folder, objective, TYPES[objective])
    said: dict[str, str] = {}
    for start in range(0, len(TYPES[objective]), AT_ONCE):
        some = list(TYPES[objective][start : start + AT_ONCE])
        said |= pool.run(1, verdicts, str(folder), objective, some)[0]
    missing = (" has no config.json", " has no *.safetensors")
    small = {n: f"not small: {why}" for n, why in lacking.items() if any(words in said[n] for words in missing)}
    return {name: small.get(name, what).replace(str(folder), "FOLDER") for name, what in said.items()}


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("objective", TYPES)
def test_a_family_is_equal_or_refused(pool, tmp_path, objective):
    said = _all(pool, tmp_path, objective)
    _write(objective, said)
    odd = {name: what for name, what in said.items() if not what.startswith(("equal", "refused (2): ", "not small: "))}
    assert not odd
    assert {name for name, what in said.items() if what == "equal"} >= EQUAL[objective]


def test_two_ranks_give_the_same(pool, tmp_path):
    some = ["t5", "bart", "whisper"]
    assert write_each(tmp_path, "seq2seq", some) == {}
    assert pool.run(2, verdicts, str(tmp_path), "seq2seq", some)[0] == dict.fromkeys(some, "equal")


def _write(objective: str, said: dict[str, str]) -> None:
    """Write an objective's part of the table."""
    parts = {}
    if TABLE.exists():
        for part in TABLE.read_text().split("\n## ")[1:]:
            name, _, text = part.partition("\n")
            parts[name] = text.strip("\n")
    lines = ["", "| model type | | remark |", "|---|---|---|"]
    for name, what in said.items():
        kind, _, why = what.partition(": ")
        remark = why.replace("|", "\\|").replace("\n", " ")[:200]
        lines.append(f"| {name} | {kind.removesuffix(' (2)')} | {remark} |")
    parts[objective] = "\n".join(lines).strip("\n")
    whole = [f"\n## {name}\n\n{parts[name]}\n" for name in TYPES if name in parts]
    TABLE.write_text(HEADER + "".join(whole))
