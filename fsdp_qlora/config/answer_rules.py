"""Rules on what `generate` asks and what `evaluate` measures. See `fsdp_qlora.config.rules`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fsdp_qlora.config.auto import number
from fsdp_qlora.config.schema import DataSettings, RunConfig


def _prompts(config: RunConfig) -> Iterator[str]:
    given = [key for key in ("prompt", "prompt_file") if getattr(config, key) is not None]
    if len(given) == 2:
        yield "prompt_file: give prompt or prompt_file, not both."
    if config.generate.prompts is not None:
        if given:
            yield "generate.prompts: give one prompt or a file of prompts, not both."
        if config.generate.to is None:
            yield "generate.to: not set. Give the file for the answers to generate.prompts."


def _chat(config: RunConfig) -> Iterator[str]:
    given = [key for key in ("prompt", "prompt_file") if getattr(config, key) is not None]
    if config.generate.chat and (given or config.generate.prompts is not None):
        key = given[0] if given else "generate.prompts"
        yield f"generate.chat: reads what you say from standard input; leave {key} out, or generate.chat."


def _stops(config: RunConfig) -> Iterator[str]:
    if not all(config.generate.stop):
        yield "generate.stop: an empty text would end every answer; leave it out."


def _tasks(config: RunConfig) -> Iterator[str]:
    evaluate = config.evaluate
    if not evaluate.tasks:
        for key in ("task_path", "limit", "num_fewshot", "chat_template"):
            if getattr(evaluate, key):
                yield f"evaluate.{key}: is about tasks; set evaluate.tasks as well, or leave it out."


def _named_twice(config: RunConfig) -> Iterator[str]:
    evaluate = config.evaluate
    if twice := sorted({task for task in evaluate.tasks if evaluate.tasks.count(task) > 1}):
        yield f"evaluate.tasks: {', '.join(twice)} is named more than once."


ANSWER_RULES: tuple[Callable[[RunConfig], Iterator[str]], ...] = (_prompts, _chat, _stops, _tasks, _named_twice)


def has_rows(config: RunConfig) -> bool:
    """Whether the settings name held-out rows."""
    return may_hold_out(config.data) and bool(config.data.eval or config.data.train)


def may_hold_out(data: DataSettings) -> bool:
    """Whether there may be held-out rows: they are named, or taken off the training rows if there are enough."""
    return data.eval is not None or (not data.streaming and number(data.eval_fraction) != 0)
