"""lm-evaluation-harness's tasks on a sharded model. Needs the extra ``eval``.

Rank 0 runs the harness, which builds the requests and computes the metrics; all ranks compute the answers. So only rank
0 loads the tasks' data, and what the harness may draw at random is drawn once.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from transformers import PreTrainedTokenizerBase

from fsdp_qlora.config.choices import nearest
from fsdp_qlora.config.schema import EvaluateSettings, GenerateSettings
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.orders import Tell, led_by_main
from fsdp_qlora.errors import ConfigError, DataError, typed_line
from fsdp_qlora.inference.batches import Row, answer_all
from fsdp_qlora.inference.end_of_turn import EndOfTurn
from fsdp_qlora.inference.rendering import render_apart
from fsdp_qlora.inference.scores import Pair, Score, cut_pair, score_all
from fsdp_qlora.model.root import CausalModel
from fsdp_qlora.track.bars import Bar

_NEW_TOKENS = 256
"""Tokens of an answer where a task does not say: the harness's own default (`HFLM.max_gen_toks`)."""
_POSITIONS = 2048
"""A model's positions where its config does not say: the harness's own default."""
_DRAWS = 1000
"""Draws for the standard error of metrics that have no formula for it."""
_SEED = 1234
"""For the choice of examples in a prompt: the harness's own default."""
_NAMES = {"sample_len": "documents"}
"""What is not a metric in the harness's results, and what to call it."""
_KNOWN = {"do_sample", "temperature", "top_p", "top_k", "until", "max_gen_toks"}
"""Settings of generation that a task may have."""


def require_harness() -> None:
    """Check that lm-evaluation-harness is installed.

    Raises:
        ConfigError: if not.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "evaluate.tasks: needs lm-evaluation-harness, which is not installed; run `pip install 'fsdp-qlora[eval]'`."
        )


@dataclass(frozen=True)
class Work:
    """What the ranks compute for the harness. Every method is a collective."""

    model: CausalModel
    tokenizer: PreTrainedTokenizerBase
    end: EndOfTurn
    """What ends an answer besides a task's own texts."""
    positions: int
    """How many the model has; 0 if its config does not say."""
    score_batch_size: int
    batch_size: int
    """Prompts that a rank answers at once."""
    seed: int
    ranks: Ranks

    @property
    def most(self) -> int:
        """Positions that a request may take."""
        return self.positions or _POSITIONS

    def run(self, order: Mapping[str, Any]) -> list[Any]:
        """Do what rank 0 ordered; return the scores, or the answers, in the order of the requests."""
        if "pairs" in order:
            scored = Bar("scoring texts", keep=False) if self.ranks.is_main else None
            return score_all(self.model, order["pairs"], self.score_batch_size, self.ranks, scored)
        settings = GenerateSettings(**order["settings"], batch_size=self.batch_size)
        end = EndOfTurn(self.end.ids, stops=tuple(settings.stop), keeps_space=True)
        rows = [Row(number, ids) for number, ids in enumerate(order["prompts"])]
        answers: dict[int, str] = {}
        say = Bar("answering prompts", keep=False)

        def write(texts: dict[int, str]) -> None:
            answers.update(texts)
            say(len(answers), len(rows))

        answer_all(self.model, self.tokenizer, end, rows, settings, self.seed, self.ranks, write)
        return [answers[row.index] for row in rows] if self.ranks.is_main else []


def run_tasks(work: Work, settings: EvaluateSettings) -> dict[str, dict[str, float]]:
    """Run the tasks of ``evaluate.tasks``; return each task's metrics by the harness's names on rank 0, {} on others.

    A collective.

    Raises:
        ConfigError: if a task is unknown, or asks for what this does not compute.
        DataError: if its data cannot be loaded.
    """

    def lead(tell: Tell) -> dict[str, dict[str, float]]:
        def do(order: dict[str, Any]) -> list[Any]:
            tell(order)
            return work.run(order)

        return _evaluate(_language_model(work, do), _load(settings), settings)

    return led_by_main(lead, work.run, work.ranks) or {}


def _load(settings: EvaluateSettings) -> dict[str, Any]:
    """Return the harness's tasks and groups of them, with their data."""
    path = os.path.expanduser(settings.task_path) if settings.task_path else None  # noqa: PTH111  (may be no path)
    if path is not None and not os.path.isdir(path):  # noqa: PTH112
        raise ConfigError(f"evaluate.task_path: {path} is not a folder.")
    manager = _manager(path, settings.tasks)
    for name in settings.tasks:
        if name not in manager.all_tasks:
            raise ConfigError(
                f"evaluate.tasks: lm-evaluation-harness has no task {name!r}.{nearest(name, manager.all_tasks)} "
                "For tasks of your own, give their folder with evaluate.task_path."
            )
    try:
        loaded = manager.load(settings.tasks)
    except Exception as error:  # a task is a program, and its data may be anywhere
        raise DataError(f"evaluate.tasks: cannot load {', '.join(settings.tasks)}: {typed_line(error)}") from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            what = "runs what the model writes as a program" if getattr(task, "UNSAFE_CODE", False) else "needs images"
            raise ConfigError(f"evaluate.tasks: {name} {what}, which is not supported; leave it out.")
        given = task.get_config("num_fewshot")
        if settings.num_fewshot is not None and given != 0:  # 0 in a task's file means never, to the harness
            task.set_config(key="num_fewshot", value=settings.num_fewshot)
        elif given is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_SEED)
    return loaded


def _manager(path: str | None, names: Sequence[str]) -> Any:
    """Return the harness's index of tasks, of those in ``path`` alone if they are all that is asked for.

    Its own are 14,000 files, which take half a minute to read on a slow machine.
    """
    kind = importlib.import_module("lm_eval.tasks").TaskManager
    if path is not None:
        own = kind(include_path=path, include_defaults=False)
        if set(names) <= set(own.all_subtasks):  # a group may have members that are the harness's
            return own
    return kind(include_path=path)


def _evaluate(model: Any, loaded: dict[str, Any], settings: EvaluateSettings) -> dict[str, dict[str, float]]:
    """Run the harness; its caches of requests (pickles) and answers stay off."""
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # its pool would fork a process that has a process group
    with redirect_stdout(sys.stderr):  # stdout is for results
        results = importlib.import_module("lm_eval.evaluator").evaluate(
            lm=model, task_dict=loaded, limit=settings.limit or None, cache_requests=False,
            rewrite_requests_cache=False, bootstrap_iters=_DRAWS, log_samples=False,
            apply_chat_template=settings.chat_template, fewshot_as_multiturn=True,  # as from its command line
        )  # fmt: skip
    return {
        task: {_NAMES.get(str(name), str(name)): _plain(v) for name, v in metrics.items() if isinstance(v, Real)}
        for task, metrics in results["results"].items()
    }


def _plain(value: Real) -> float:
    """Return a number, perhaps numpy's, as Python's."""
    return int(value) if isinstance(value, Integral) else float(value)


def _language_model(work: Work, do: Callable[[dict[str, Any]], list[Any]]) -> Any:
    """Return the model as the harness calls it, on rank 0."""
    base: Any = importlib.import_module("lm_eval.api.model").TemplateLM
    utils = importlib.import_module("lm_eval.utils")
    special = work.tokenizer

    class Sharded(base):
        """A model whose answers all ranks compute."""

        tokenizer = special
        tokenizer_name = str(special.name_or_path)
        eot_token_id = property(lambda self: special.eos_token_id)
        prefix_token_id = property(lambda self: _first_of(special.bos_token_id, special.eos_token_id))

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return _encode(special, string, add_special_tokens, self.prefix_token_id)

        def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[Score]:
            return do({"pairs": [_fitting((context, text), work.most) for _, context, text in requests]})

        def loglikelihood_rolling(self, requests: list[Any], **_: Any) -> list[float]:
            windows = [
                utils.get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, work.most, 1)
                for (text,) in (request.args for request in requests)
            ]
            pairs = [[utils.make_disjoint_window(window) for window in windows_] for windows_ in windows]
            scores = iter(do({"pairs": [_fitting(pair, work.most) for part in pairs for pair in part]}))
            return [sum(next(scores)[0] for _ in part) for part in pairs]

        def generate_until(self, requests: list[Any], **_: Any) -> list[str]:
            return _generate([request.args for request in requests], self.tok_encode, work, do)

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            more = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
            return render_apart(special, chat_history, **more)

    return Sharded()


def _first_of(*ids: Any) -> int:
    """Return the token before a text that has none."""
    given = next((number for number in ids if isinstance(number, int)), None)
    if given is None:
        raise ConfigError("evaluate.tasks: the tokenizer has neither a begin nor an end token, as tasks need.")
    return given


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool | None, prefix: int) -> list[int]:
    """Return a text's tokens, as `HFLM.tok_encode`: no begin token if the text has it already."""
    if special is None and text.startswith(str(tokenizer.decode([prefix]))):
        special = False
    return tokenizer.encode(text) if special is None else tokenizer.encode(text, add_special_tokens=special)


def _fitting(pair: Pair, most: int) -> Pair:
    context, text = pair
    if not text or len(text) > most:
        raise ConfigError(
            f"evaluate.tasks: a text to be scored has {len(text)} tokens, and the model has {most} positions."
        )
    return cut_pair((list(context), list(text)), most)


def _generate(
    requests: Sequence[tuple[str, dict[str, Any]]], encode: Callable[[str], list[int]], work: Work,
    do: Callable[[dict[str, Any]], list[Any]],
) -> list[str]:  # fmt: skip
    """Answer requests of one setting after the other's, each in the order of the requests."""
    texts = [""] * len(requests)
    keys = [json.dumps(settings, sort_keys=True) for _, settings in requests]
    for key in dict.fromkeys(keys):
        chosen = [number for number, own in enumerate(keys) if own == key]
        settings = _settings(json.loads(key))
        room = work.most - settings["max_new_tokens"]
        if room < 1:
            raise ConfigError(
                f"evaluate.tasks: an answer may take {settings['max_new_tokens']} tokens, and the model has "
                f"{work.most} positions."
            )
        prompts = [encode(requests[number][0])[-room:] for number in chosen]
        for number, text in zip(chosen, do({"prompts": prompts, "settings": settings}), strict=True):
            texts[number] = text
    return texts


def _settings(asked: dict[str, Any]) -> dict[str, Any]:
    """Return what a task asks for as `GenerateSettings`."""
    given = importlib.import_module("lm_eval.models.utils").normalize_gen_kwargs(asked, _NEW_TOKENS)
    if unknown := sorted(given.keys() - _KNOWN):
        raise ConfigError(f"evaluate.tasks: a task asks for {', '.join(unknown)} in generation_kwargs, not supported.")
    sampled = {key: given[key] for key in ("top_p", "top_k") if key in given}
    return {
        "max_new_tokens": given["max_gen_toks"], "stop": [text for text in given["until"] if text],
        "temperature": float(given.get("temperature", 0.0)) if given["do_sample"] else 0.0, **sampled,
    }  # fmt: skip
