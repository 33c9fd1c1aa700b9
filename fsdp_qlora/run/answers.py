"""Answers a file of prompts (``generate.prompts``) with a prepared model."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from fsdp_qlora.adapters.served import BASE
from fsdp_qlora.config.convert import to_dict
from fsdp_qlora.config.schema import GenerateSettings, RunConfig
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.reduce import on_every, on_main
from fsdp_qlora.errors import ConfigError, DataError
from fsdp_qlora.inference.batches import Row, answer_all
from fsdp_qlora.inference.end_of_turn import EndOfTurn, end_of_turn
from fsdp_qlora.inference.generate import encode_conversations, encode_prompt
from fsdp_qlora.inference.prompts import ANSWER, Answers, Prompt, part_of, read_prompts
from fsdp_qlora.load.safetensors import file_digests
from fsdp_qlora.model.root import CausalModel
from fsdp_qlora.track.bars import Bar


class Answering(Protocol):
    """What answers: a `Prepared` model, or one that is `Spread` over devices."""

    @property
    def model(self) -> CausalModel:
        """Computes the answers."""
        ...

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        ...

    @property
    def ranks(self) -> Ranks:
        """The processes that compute together."""
        ...

    @property
    def folder(self) -> Path:
        """The base model's folder."""
        ...

    @property
    def max_positions(self) -> int:
        """Positions that the model has; 0: unknown."""
        ...

    @property
    def adapters(self) -> Mapping[str, object]:
        """The adapters that have names."""
        ...


def answer_file(config: RunConfig, prepared: Answering) -> int:
    """Answer every prompt of the file that has no answer yet; return how many there were. Every rank calls it.

    Raises:
        DataError: if the file of prompts cannot be read.
        ConfigError: if the file of answers is there already.
        ModelError: if the chat template rejects a prompt.
    """
    settings, ranks = config.generate, prepared.ranks
    assert settings.prompts is not None and settings.to is not None
    file, to = Path(settings.prompts).expanduser(), Path(settings.to).expanduser()
    prompts = on_every(lambda: prompts_of(config), ranks)
    answers: list[Answers] = []

    def open_answers() -> list[int]:
        answers.append(Answers(to, prompts, _asked(config, prepared)))
        return [prompt.index for prompt in answers[0].left]

    left = set(on_main(open_answers, ranks))
    missing = [prompt for prompt in prompts if prompt.index in left]
    rows = on_every(lambda: _rows(prepared, missing, settings, "generate.prompts", file), ranks)
    end = ending(prepared, settings)
    bar = Bar("answering")
    done = len(prompts) - len(rows)
    if done and ranks.is_main:
        print(f"{done} of {len(prompts)} prompts are answered already; going on with the others", file=sys.stderr)

    def write(texts: dict[int, str]) -> None:
        nonlocal done
        answers[0].add(texts)
        done += len(texts)
        bar(done, len(prompts))

    answer_all(prepared.model, prepared.tokenizer, end, rows, settings, sampling_seed(config), ranks, write)

    def finish() -> None:
        answers[0].finish()

    on_main(finish, ranks)
    return len(prompts)


def prompts_of(config: RunConfig) -> list[Prompt]:
    """Read the file of prompts; see `read_prompts`.

    Raises:
        ConfigError: if it lies where the answers are to be collected.
    """
    generate = config.generate
    file, to = Path(generate.prompts or "").expanduser(), Path(generate.to or "").expanduser()
    if file.resolve() == part_of(to).resolve():
        raise ConfigError(
            f"generate.to: answers are collected in {part_of(to)}, which is the file of prompts; choose another file."
        )
    adapters = [*config.adapter, BASE] if isinstance(config.adapter, dict) else []
    return read_prompts(file, adapters, generate.adapter)


def check_files(config: RunConfig, ranks: Ranks) -> None:
    """Check the files of prompts and answers, so that a model is not loaded for nothing. Every rank calls it.

    Raises:
        DataError: if the file of prompts cannot be read.
        ConfigError: if the file of answers is there already.
    """
    prompts = on_every(lambda: prompts_of(config), ranks)

    def check() -> None:
        Answers(Path(config.generate.to or "").expanduser(), prompts)

    on_main(check, ranks)


def _asked(config: RunConfig, prepared: Answering) -> str:
    """Return a digest of the weights that answer, and of the settings that an answer depends on."""
    generate, template = config.generate, prepared.tokenizer.chat_template
    named = config.adapter if isinstance(config.adapter, dict) else {"": config.adapter} if config.adapter else {}
    settings = [
        file_digests(prepared.folder),
        {name: file_digests(Path(folder).expanduser()) for name, folder in named.items()},
        to_dict(config.quant), config.precision.name, str(template),
        generate.max_new_tokens, generate.temperature, generate.top_p, generate.top_k, list(generate.stop),
        sampling_seed(config) if generate.temperature else None,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def answer_again(config: RunConfig, prepared: Answering, file: Path, key: str) -> list[dict[str, Any]]:
    """Answer every prompt of a file; return its lines with their answers on rank 0, [] on the others.

    Every rank calls it. ``key`` is the setting that names the file.

    Raises:
        DataError: if the file of prompts cannot be read.
        ModelError: if the chat template rejects a prompt.
    """
    settings, ranks = config.generate, prepared.ranks
    prompts = on_every(lambda: read_prompts(file, key=key), ranks)
    rows = on_every(lambda: _rows(prepared, prompts, settings, key, file), ranks)
    texts: dict[int, str] = {}
    end = ending(prepared, settings)
    answer_all(prepared.model, prepared.tokenizer, end, rows, settings, sampling_seed(config), ranks, texts.update)
    return [{**prompt.fields, ANSWER: texts[prompt.index]} for prompt in prompts] if ranks.is_main else []


def ending(prepared: Answering, settings: GenerateSettings) -> EndOfTurn:
    """Return what ends an answer of a prepared model: its own end of turn, and ``generate.stop``."""
    own = end_of_turn(prepared.folder, prepared.model.base.config, prepared.tokenizer)
    return replace(own, stops=tuple(settings.stop))


def sampling_seed(config: RunConfig) -> int:
    """Return the seed for sampled answers."""
    return config.run.seed if config.generate.seed is None else config.generate.seed


def prompt_ids(prepared: Answering, prompt: str, settings: GenerateSettings) -> list[int]:
    """Return the tokens of a user's prompt.

    Raises:
        DataError: if it and its answer need more positions than the model has.
        ModelError: if the chat template rejects it.
    """
    ids: list[int] = encode_prompt(prepared.tokenizer, prompt)["input_ids"][0].tolist()
    _require_fit([Row(0, ids)], {}, settings, prepared.max_positions, "prompt")
    return ids


def _require_fit(
    rows: list[Row], lines: Mapping[int, int], settings: GenerateSettings, positions: int, where: str
) -> None:  # fmt: skip
    """Check that no prompt and its answer need more positions than the model has; ``lines`` are the rows' in a file."""
    room = positions - settings.max_new_tokens
    long = sorted((row for row in rows if positions and len(row.ids) > room), key=lambda row: row.index)
    if not long:
        return
    has = f"{where}: the model has {positions} positions, and the answer may take {settings.max_new_tokens} of them"
    if not lines:
        raise DataError(f"{has} (generate.max_new_tokens): too many for a prompt of {len(long[0].ids)} tokens.")
    named = ", ".join(f"{lines[row.index]} ({len(row.ids)} tokens)" for row in long[:5])
    raise DataError(
        f"{has} (generate.max_new_tokens): too many for {len(long)} of the prompts, those in line {named}"
        f"{' ...' if len(long) > 5 else ''}."
    )


def _rows(prepared: Answering, prompts: list[Prompt], settings: GenerateSettings, key: str, file: Path) -> list[Row]:
    """Return the tokens of a file's prompts, which fit into the model with their answers."""
    names = [f"{file.name} line {prompt.line}" for prompt in prompts]
    encoded = encode_conversations(prepared.tokenizer, [prompt.messages for prompt in prompts], names)
    rows = [Row(prompt.index, ids, prompt.adapter) for prompt, ids in zip(prompts, encoded, strict=True)]
    lines = {prompt.index: prompt.line for prompt in prompts}
    _require_fit(rows, lines, settings, prepared.max_positions, f"{key}: {file}")
    return rows
