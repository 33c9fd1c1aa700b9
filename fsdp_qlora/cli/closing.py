"""Prints what a run came to: the verdict, prompts before and after, and the commands to try next."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from fsdp_qlora.cli.foreign import switches_on
from fsdp_qlora.cli.quoting import command
from fsdp_qlora.cli.tables import COLUMNS
from fsdp_qlora.config.saved import read_config
from fsdp_qlora.config.schema import from_dict
from fsdp_qlora.run.folder import RunFolder
from fsdp_qlora.shown import visible


def sample_rows(samples: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return the table's rows of the sample prompts: each with the answer wanted, if it is known, before and after."""
    rows: list[tuple[str, str]] = []
    for sample in samples:
        rows.append(("asked", sample["prompt"]))
        if "wanted" in sample:
            rows.append(("  wanted", sample["wanted"]))
        if sample["before"] is not None:  # a resumed run may not know it
            rows.append(("  before", sample["before"]))
        rows.append(("  after", sample["after"]))
    return rows


def print_verdict(summary: dict[str, Any], folder: RunFolder) -> None:
    """Print how the run ended, in words, and the command that follows from it. Runs of before have no verdict."""
    if (verdict := summary.get("verdict")) is None:
        return
    print("\n".join(textwrap.wrap(visible(f"{verdict['word']}: {verdict['text']}"), COLUMNS)))
    best, answers = verdict["best_checkpoint"], summary.get("answers", True)
    if best is not None and answers and verdict["word"] == "overfits":
        adapter = Path(best) / "adapter"
        print(f"best checkpoint: {command('generate', *_from(folder), f'adapter={adapter}', _prompt(summary))}")
    if verdict["next"]:
        again = ["train", *_from(folder), f"run.name={_next_name(folder)}", *verdict["next"]]
        print(f"train again: {command(*again)}", flush=True)


def print_next(summary: dict[str, Any], folder: RunFolder, key: str, result: Path) -> None:
    """Print the command that asks the trained model, with a prompt of the data. ``key`` names the result for it."""
    # not in the table, which wraps lines: it is meant for pasting
    verb, more = ("generate", [_prompt(summary)]) if summary.get("answers", True) else ("evaluate", [])
    print(f"try next: {command(verb, *_from(folder), f'{key}={result}', *more)}", flush=True)


def _prompt(summary: dict[str, Any]) -> str:
    return f"prompt={summary['samples'][0]['prompt'] if summary['samples'] else '...'}"


def _from(folder: RunFolder) -> list[str]:
    switches = [f"{key}=true" for key in switches_on(from_dict(read_config(str(folder.config_file))))]
    return [f"run_from={folder.config_file}", *switches]


def _next_name(folder: RunFolder) -> str:
    """Return the first free ``<name>-2``, ``<name>-3``, ..., as ``run.name`` would have it."""
    number = 2
    while folder.path.with_name(f"{folder.path.name}-{number}").exists():
        number += 1
    name = from_dict(read_config(str(folder.config_file))).run.name
    return f"{name}-{number}"
