"""Answers a file of prompts (``generate.prompts``) with a prepared model."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from fsdp_qlora.config.schema import GenerateSettings, RunConfig
from fsdp_qlora.distributed.reduce import on_every, on_main
from fsdp_qlora.errors import DataError
from fsdp_qlora.inference.batches import Row, answer_all
from fsdp_qlora.inference.end_of_turn import end_of_turn
from fsdp_qlora.inference.generate import encode_conversations
from fsdp_qlora.inference.prompts import Answers, Prompt, read_prompts
from fsdp_qlora.run.prepared import Prepared


def answer_file(config: RunConfig, prepared: Prepared) -> int:
    """Answer every prompt of the file that has no answer yet; return how many there were. Every rank calls it.

    Raises:
        DataError: if the file of prompts cannot be read.
        ConfigError: if the file of answers is there already.
        ModelError: if the chat template rejects a prompt.
    """
    settings, ranks = config.generate, prepared.ranks
    assert settings.prompts is not None and settings.to is not None
    file, to = Path(settings.prompts).expanduser(), Path(settings.to).expanduser()
    prompts = on_every(lambda: read_prompts(file), ranks)
    answers: list[Answers] = []

    def open_answers() -> list[int]:
        answers.append(Answers(to, prompts))
        return [prompt.index for prompt in answers[0].left]

    left = set(on_main(open_answers, ranks))
    rows = on_every(lambda: _rows(prepared, [prompt for prompt in prompts if prompt.index in left]), ranks)
    on_every(lambda: _require_fit(rows, settings, prepared.shapes.max_positions, file), ranks)
    end = end_of_turn(prepared.folder, prepared.model.base.config, prepared.tokenizer)
    started = time.perf_counter()
    done = len(prompts) - len(rows)
    if done and ranks.is_main:
        print(f"{done} of {len(prompts)} prompts are answered already; going on with the others", file=sys.stderr)

    def write(texts: dict[int, str]) -> None:
        nonlocal done
        answers[0].add(texts)
        done += len(texts)
        seconds = time.perf_counter() - started
        print(f"answered {done}/{len(prompts)}, {seconds:.0f} s", file=sys.stderr, flush=True)

    answer_all(
        prepared.model, prepared.tokenizer, end, rows, settings, config.run.seed, ranks, write,
    )  # fmt: skip

    def finish() -> None:
        answers[0].finish()

    on_main(finish, ranks)
    return len(prompts)


def _require_fit(rows: list[Row], settings: GenerateSettings, positions: int, file: Path) -> None:
    """Check that no prompt and its answer need more positions than the model has."""
    room = positions - settings.max_new_tokens
    long = [row for row in rows if positions and len(row.ids) > room]
    if long:
        named = ", ".join(f"{row.index + 1} ({len(row.ids)} tokens)" for row in sorted(long, key=lambda r: r.index)[:5])
        raise DataError(
            f"generate.prompts: {file}: the model has {positions} positions, {settings.max_new_tokens} of them for the "
            f"answer (generate.max_new_tokens); {len(long)} prompts are longer than the rest: {named}."
        )


def _rows(prepared: Prepared, prompts: list[Prompt]) -> list[Row]:
    encoded = encode_conversations(prepared.tokenizer, [prompt.messages for prompt in prompts])
    return [Row(prompt.index, ids) for prompt, ids in zip(prompts, encoded, strict=True)]
