"""Fixtures that all tests share: the pool of ranks, a tiny model, rows, the command line's environment."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fsdp_qlora.cli.logs import listen
from tests import tiny, warm
from tests.pool import Pool

listen()
ROOT = Path(__file__).resolve().parent.parent


SAMPLE_SECONDS = 240
"""At most so long a sample of the whole matrices takes on two slow cores: CI has 45 minutes."""
LONG = {
    "test_rank_0_killed_at_every_write_point": 180, "test_the_real_model_over_20_steps": 180, "[compiled": 70,
    "test_readme_commands_run": 480, "test_simulated_peak_of_the_embedded_model": 30, "-full-": 15,
    "test_goes_on_with_one_node_of_two": 60, "test_every_family": 1200, "test_two_ranks_give_the_same": 20,
    "test_a_packed_compiled_run": 120, "test_compiling_that": 90, "kimi-k2": 20,
    "test_transformers_serve": 300, "test_killed_at_several": 45, "test_a_model_is_read_back": 60, "test_serve": 40,
    "test_a_merged_model_is_the_trained_one": 600, "test_an_adapter_alone_is_the_trained_model": 600,
    "test_a_merge_stays_within_the_memory": 60,
    "dreambooth": 60, "test_from_images": 60,
    "test_96_rows_are": 600, "test_a_learning_rate_far_off": 60, "test_digits_are": 600, "_of_an_encyclopedia": 300,
    "test_the_answer_that_a_question": 300, "test_a_family_is_equal_or_refused": 300, "test_sixteen_": 60, "test_20_steps_are": 30,
    "test_500_prompts": 90, "test_no_prompt_is_lost": 60, "test_a_report_in_a_browser": 60,
    "test_a_run_ends_with_its_page": 40, "test_a_run_that_fails_has_a_page": 40, "test_capitals_and": 300,
    "test_a_sweep_killed": 100, "test_a_search_of_four": 80, "test_a_job_that_fails_ends": 60,
    "test_tensorboard_has": 30, "test_wandb_offline_and": 20, "test_mlflow_has": 20, "test_a_server_that_does_not": 15,
    "test_every_part_at_small_size": 150, "test_a_part_stops_at_its_limit": 60,
}  # fmt: skip
"""Seconds of tests with this in their name, roughly; others take about 4. What is longer than a sample is left to
`make test-full`."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where FSDP_QLORA_TEST_FIFTH names a seed (CI), keep the examples and a seeded fifth of the whole matrices."""
    import random

    seed = os.environ.get("FSDP_QLORA_TEST_FIFTH")
    if seed is None:
        return
    full = [item for item in items if item.get_closest_marker("full")]
    kept = {item for item in full if item.path.name == "test_examples.py" and "benchmark" not in item.name}
    left = SAMPLE_SECONDS
    for item in random.Random(seed).sample(full, -(-len(full) // 5)):
        seconds = next((seconds for part, seconds in LONG.items() if part in item.name), 4)
        if seconds <= left:
            kept.add(item)
            left -= seconds
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Four gloo ranks, started once."""
    ranks = Pool()
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Llama (tied head, 2 layers) with tokenizer and chat template."""
    return tiny.make_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def chat_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSONL of 48 short conversations."""
    return tiny.write_chat_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture(scope="session")
def cli_env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment for the command line: a cache of its own, no hub, W&B offline."""
    cache = tmp_path_factory.mktemp("cache")
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("FSDP_QLORA_", "WANDB_", "RANK", "WORLD_SIZE"))}
    return {
        **keep,
        "FSDP_QLORA_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }


@pytest.fixture(scope="session")
def real_model() -> Path:
    """Folder of the embedded SmolLM2-135M-Instruct; the test is skipped where it was not fetched (make assets)."""
    from fsdp_qlora.cli.outside import embedded_path

    folder = Path(embedded_path("smollm2-135m-instruct"))
    if not (folder / "config.json").is_file():
        pytest.skip("the embedded model is not here; `make assets` fetches it")
    return folder


@pytest.fixture(scope="session")
def real_data(real_model: Path) -> Path:
    """Folder of the embedded real data; the test is skipped where they were not fetched (make assets)."""
    folder = real_model.parent
    if not (folder / "wiki_demo.txt").is_file():
        pytest.skip("the embedded data are not here; `make assets` fetches them")
    return folder


Cli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def cli(cli_env: dict[str, str], tmp_path: Path) -> Cli:
    """Run ``fsdp-qlora`` in a fresh folder: ``cli("train", "a=b", timeout=60)``.

    In a process that has imported already, but ``cold`` where the start itself is tried. With ``num_ranks`` there is no
    launcher: so many ranks are started as torchrun would, and stdout and stderr hold what both streams of all said.
    """

    def run(
        *arguments: str, timeout: float = 400, cold: bool = False, num_ranks: int = 0, **extra: str
    ) -> subprocess.CompletedProcess[str]:
        env = {**cli_env, **extra}
        if num_ranks:
            codes, text = warm.run(arguments, tmp_path, env, num_ranks, timeout=timeout)
            return subprocess.CompletedProcess(list(arguments), max(codes, key=abs), text, text)
        if not cold:
            return warm.command(arguments, tmp_path, env, timeout)
        return subprocess.run(
            [sys.executable, "-m", "fsdp_qlora", *arguments], cwd=tmp_path, env=env, text=True, capture_output=True,
            timeout=timeout, check=False,
        )  # fmt: skip

    return run


@pytest.fixture
def tiny_run(tiny_model: Path, chat_rows: Path) -> list[str]:
    """Overrides of a short run on the tiny model and rows."""
    return [
        f"model.name={tiny_model}", f"data.train={chat_rows}", "data.eval_fraction=0.1", "data.max_length=64",
        "train.max_steps=4", "train.global_batch_size=6", "train.micro_batch_size=2", "lora.r=4",
        "run.name=tiny", "launcher.device=cpu", "optim.lr=2e-4", "train.sample_held_out=0",
    ]  # fmt: skip
