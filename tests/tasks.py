"""Offline tasks of lm-evaluation-harness over rows made on the spot: one of each kind of request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.tiny import sentence

CHOICE = """\
task: words_choice
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""
ANSWER = """\
task: words_answer
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs:
  until: [" fox", "zz"]
  max_gen_toks: 10
metric_list:
  - metric: exact_match
  - metric: chrf
"""
LAST = """\
task: words_last
output_type: loglikelihood
doc_to_text: "{{text}}"
doc_to_target: "{{choices[answer]}}"
metric_list:
  - metric: perplexity
  - metric: acc
"""
ROLLING = """\
task: words_rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{long}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
"""
TASKS = {"words_choice": CHOICE, "words_answer": ANSWER, "words_last": LAST, "words_rolling": ROLLING}


def write_tasks(folder: Path, count: int = 7) -> Path:
    """Write the tasks and their rows; return the folder. One row is longer than the tiny model's 512 positions."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for n in range(count):
        choices = [" " + sentence(n + k, 1 + (n + k) % 3) for k in range(3)]
        long = sentence(n, 700 if n == 2 else 5 + 3 * n)
        rows.append({"text": sentence(n, 3 + 2 * (n % 4)), "choices": choices, "answer": n % 3, "long": long})
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f'dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: "{file}"\ntest_split: test\n'
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text + data)
    return folder
