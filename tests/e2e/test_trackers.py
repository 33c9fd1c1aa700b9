"""Several trackers at once: what each has is what metrics.jsonl has, also after a resume; none can stop a run."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

NEEDS = "needs the package {0}: pip install 'fsdp-qlora[{0}]'"


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def wanted(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return each number of metrics.jsonl by its name, with its step."""
    values: dict[str, list[tuple[int, float]]] = {}
    for line in lines(folder):
        for name, value in line.items():
            if name not in ("time", "step") and isinstance(value, int | float):
                values.setdefault(name, []).append((line["step"], value))
    return values


def in_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the scalars that TensorBoard's own reader finds."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason=NEEDS.format("tensorboard")
    )
    events = accumulator.EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def in_float32(values: dict[str, list[tuple[int, float]]]) -> dict[str, list[tuple[int, float]]]:
    """Return the values as TensorBoard stores them."""
    return {
        name: [(step, struct.unpack("f", struct.pack("f", v))[0]) for step, v in all_] for name, all_ in values.items()
    }


@pytest.mark.full
def test_tensorboard_has_every_value_of_metrics_jsonl_also_after_a_resume(cli, tiny_run, tmp_path):
    pytest.importorskip("tensorboard", reason=NEEDS.format("tensorboard"))
    run = [
        *tiny_run,
        "track=[wandb,tensorboard]",
        "train.eval_every=2",
        "checkpoint.every_steps=2",
        "train.max_steps=6",
    ]
    folder = tmp_path / "outputs/tiny"
    first = cli("train", *run, num_ranks=2, WANDB_MODE="offline")
    assert first.returncode == 0, first.stderr
    assert in_tensorboard(folder) == in_float32(wanted(folder)) and len(wanted(folder)["loss"]) == 6
    again = cli("train", *run, "train.max_steps=9", num_ranks=1, WANDB_MODE="offline")
    assert again.returncode == 0, again.stderr
    assert in_tensorboard(folder) == in_float32(wanted(folder)) and len(wanted(folder)["loss"]) == 9
    (folder / "summary.json").unlink()
    newest = sorted((folder / "checkpoints").glob("step_*"))[-1]
    (newest / "COMPLETE").unlink()  # so it resumes from step 8, and step 9 is run again
    third = cli("train", *run, "train.max_steps=9", num_ranks=1, WANDB_MODE="offline")
    assert third.returncode == 0, third.stderr
    assert [step for step, _ in wanted(folder)["loss"]] == list(range(1, 10))
    assert in_tensorboard(folder) == in_float32(wanted(folder))


def in_wandb(folder: Path) -> list[Any]:
    """Return the records of the offline runs of a run folder, in order, from W&B's own files (LevelDB's log format)."""
    from wandb.proto.wandb_internal_pb2 import Record

    records = []
    for file in sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime):
        data, place, body = file.read_bytes(), 7, b""
        while place + 7 <= len(data):
            if 32768 - place % 32768 < 7:  # what is left of a block is padding
                place += 32768 - place % 32768
                continue
            _, length, kind = struct.unpack("<IHB", data[place : place + 7])
            body += data[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):  # a whole record, or the last part of one
                records.append(Record.FromString(body))
                body = b""
    return records


@pytest.mark.full
def test_wandb_offline_and_resumed_is_one_run_with_config_summary_and_adapter(cli, tiny_run, tmp_path):
    run = [*tiny_run, "track=[console,wandb]", "track.wandb_group=tries", "track.wandb_tags=[a,b]"]
    run += ["track.wandb_notes=two words", "track.wandb_adapter=true", "train.eval_every=2"]
    folder = tmp_path / "outputs/tiny"
    for steps in (2, 4):
        done = cli("train", *run, f"train.max_steps={steps}", num_ranks=1, WANDB_MODE="offline")
        assert done.returncode == 0 and f"step {steps}/" in done.stdout, done.stderr
    records = in_wandb(folder)
    runs = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    identity = (folder / "wandb_run_id").read_text()
    assert {r.run_id for r in runs} == {identity} and {r.run_group for r in runs} == {"tries"}
    assert all(list(r.tags) == ["a", "b"] and r.notes == "two words" and r.display_name == "tiny" for r in runs)
    config = {item.key: json.loads(item.value_json) for item in runs[-1].config.update}
    assert config["lora"]["r"] == 4 and config["train"]["max_steps"] == 4
    logged: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        if record.WhichOneof("record_type") == "history":
            row = {"".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            for name, value in row.items():
                if name != "step" and not name.startswith("_"):
                    logged.setdefault(name, []).append((row["step"], value))
    assert logged == wanted(folder)
    assert {record.artifact.name for record in records if record.artifact.name} == {f"adapter-{identity}"}
    updates = [item for record in records for item in record.summary.update]
    final = {"".join(item.nested_key) or item.key: json.loads(item.value_json) for item in updates}
    assert final["final/eval_loss_after"] == json.loads((folder / "summary.json").read_text())["eval_loss_after"]


@pytest.mark.full
def test_mlflow_has_every_value_of_metrics_jsonl_in_one_run_also_after_a_resume(cli, tiny_run, tmp_path):
    client = pytest.importorskip("mlflow.tracking", reason=NEEDS.format("mlflow")).MlflowClient
    run = [*tiny_run, "track=mlflow", "train.eval_every=2", "checkpoint.every_steps=2"]
    folder, uri = tmp_path / "outputs/tiny", f"sqlite:///{tmp_path}/outputs/mlflow.db"
    for steps in (3, 5):
        done = cli("train", *run, f"train.max_steps={steps}", num_ranks=1)
        assert done.returncode == 0 and "failed" not in done.stdout, done.stdout
        reader = client(uri)
        (logged,) = reader.search_runs([reader.get_experiment_by_name("fsdp_qlora").experiment_id])
        assert logged.info.run_id == (folder / "mlflow_run_id").read_text() and logged.info.status == "FINISHED"
        history = {name: reader.get_metric_history(logged.info.run_id, name) for name in logged.data.metrics}
        assert {name: [(m.step, m.value) for m in all_] for name, all_ in history.items()} == wanted(folder)
    assert logged.data.params["lora.r"] == "4" and logged.info.run_name == "tiny"


@pytest.mark.full
def test_a_server_that_does_not_answer_costs_a_warning(cli, tiny_run, tmp_path):
    pytest.importorskip("mlflow", reason=NEEDS.format("mlflow"))
    run = [*tiny_run, "track=mlflow", "track.mlflow_uri=http://127.0.0.1:9"]
    done = cli("train", *run, num_ranks=1, MLFLOW_HTTP_REQUEST_MAX_RETRIES="0")
    assert done.returncode == 0 and done.stdout.count("track=mlflow failed") == 1, done.stdout
    assert len(wanted(tmp_path / "outputs/tiny")["loss"]) == 4


@pytest.mark.full
def test_a_tracker_that_cannot_be_opened_costs_a_warning(cli, tiny_run, tmp_path):
    pytest.importorskip("tensorboard", reason=NEEDS.format("tensorboard"))
    (tmp_path / "outputs/tiny").mkdir(parents=True)
    (tmp_path / "outputs/tiny/tensorboard").write_text("not a folder")
    done = cli("train", *tiny_run, "track=tensorboard", num_ranks=1)
    assert done.returncode == 0 and done.stdout.count("track=tensorboard failed") == 1, done.stderr
    assert len(wanted(tmp_path / "outputs/tiny")["loss"]) == 4
