"""The GPU table: what is drawn, what a row says when memory runs out, and that no figure is made up."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks.drawn import BLOCK, DrawnWeights, write_drawn, write_header
from benchmarks.gpu.__main__ import RESULTS, main
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.report import HEADER, out_of_memory, write_report
from benchmarks.gpu.shapes import NAMES, write_shape
from benchmarks.gpu.suite import count
from benchmarks.step_rank import serve
from benchmarks.step_rows import Rows, draw_rows
from fsdp_qlora.load.safetensors import SafetensorsFolder

H100 = {
    "device": "NVIDIA H100 80GB HBM3", "accelerator": "cuda", "cards": 2, "cores": 16, "python": "3.12.1",
    "driver": "580.1", "runtime": "13.0", "date": "2026-11-27",
    "versions": {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2", "bitsandbytes": "0.50.2", "trl": "1.16"},
}  # fmt: skip
CPU = {**H100, "device": "a processor", "accelerator": None, "cards": 0, "driver": None, "runtime": None}
LLAMA = 8_030_261_248


@pytest.fixture
def drawn(tmp_path: Path) -> DrawnWeights:
    write_header(tmp_path, {"wide.weight": (2049, 1025), "other.weight": (2049, 1025), "norm.weight": (64,)})
    return DrawnWeights(tmp_path)


def test_any_cut_of_a_drawn_tensor_has_the_values_of_the_whole(drawn):
    whole = drawn.whole("wide.weight").view(-1)
    assert whole.numel() > 2 * BLOCK
    entry = drawn.entries["wide.weight"]
    for cuts in ([0, 7, BLOCK - 1, 2 * BLOCK + 3, whole.numel()], [0, whole.numel() // 2, whole.numel()]):
        pieces = [drawn.read_entry(entry, a, b) for a, b in reversed(list(itertools.pairwise(cuts)))]
        assert torch.equal(torch.cat(pieces[::-1]), whole)
    assert drawn.read_entry(entry, 5, 5).numel() == 0
    odd = drawn.read_bytes(entry, 3, 9)
    assert torch.equal(odd, whole[:5].view(torch.uint8)[3:9])


def test_drawn_tensors_differ_and_look_like_a_models(drawn):
    wide, other, norm = (drawn.whole(name).float() for name in ("wide.weight", "other.weight", "norm.weight"))
    assert not torch.equal(wide, other)
    assert abs(float(wide.std()) - 0.02) < 1e-3 and abs(float(wide.mean())) < 1e-3
    assert abs(float(norm.mean()) - 1) < 0.02
    first, second = wide.view(-1)[:BLOCK], wide.view(-1)[BLOCK : 2 * BLOCK]
    assert not torch.equal(first, second)


def test_nothing_drawn_is_on_the_disk(drawn):
    (file,) = drawn.folder.glob("*.safetensors")
    assert file.stat().st_size == drawn.total_bytes > 8_000_000
    assert 512 * file.stat().st_blocks < 100_000
    before = drawn.bytes_read
    drawn.whole("wide.weight")
    assert drawn.bytes_read - before == 2 * 2049 * 1025


def test_drawn_weights_in_files_are_the_drawn_ones(drawn, tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    write_drawn(drawn, folder, file_bytes=5_000_000)
    stored = SafetensorsFolder(folder)
    assert len(list(folder.glob("*.safetensors"))) == 2
    for name, entry in drawn.entries.items():
        assert torch.equal(stored.read_entry(stored.entries[name], 0, entry.numel), drawn.whole(name).view(-1))


def test_a_token_goes_through_the_experts_it_is_sent_to(tmp_path):
    dense = write_shape("llama8b", tmp_path / "dense", small=False)
    assert dense.weights_of_token == dense.weights == LLAMA
    experts = write_shape("moe", tmp_path / "experts", small=True)
    idle = 2 * 2 * 3 * 128 * 256  # layers, experts that a token is not sent to, matrices of 128 x 256
    assert experts.weights - experts.weights_of_token == idle
    assert set(NAMES) <= set(PARTS)


def test_packed_rows_are_documents_end_to_end(tmp_path):
    draw_rows(tmp_path / "rows.json", 64, 8, 512)
    rows = Rows(tmp_path / "rows.json")
    ids, labels = rows.of(1, 1, 2, 2)
    documents = rows.documents(1, 1, 2, 2)
    assert documents is not None and len(documents) == 2
    assert torch.equal(torch.cat([piece for piece, _ in documents[0]]), ids[0])
    learned = torch.cat([mask for _, mask in documents[1]])
    assert torch.equal(learned, labels[1] != -100)
    assert all(not bool(mask[0]) for row in documents for _, mask in row), "no token of its row predicts a first one"
    assert rows.targets(1, 1, 2, 2) == int((labels != -100).sum())


def test_a_step_out_of_memory_says_what_was_planned():
    def step() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    said: list[dict] = []
    change = "train.activation_checkpointing=full (planned peak 8.3 instead of 42.8 GB)"
    serve(step, {"planned": 42_800_000_000, "smaller": change, "read": 1}, [], said.append, 0)
    (answer,) = said
    assert answer["out_of_memory"] and answer["planned"] == 42_800_000_000 and answer["smaller"] == change
    assert answer["failed"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
    text = out_of_memory({**answer, "allocated": 79_100_000_000})
    assert "wrong by at least 36.3 GB" in text and f"set {change}" in text
    assert "before a plan was known" in out_of_memory({"failed": "OutOfMemoryError: while loading"})


def test_steps_are_answered_until_there_are_no_more_lines():
    taken, said = [], []
    serve(lambda: taken.append(1), {"read": 5}, ["2\n", "3\n"], said.append, 0)
    assert len(taken) == 6 and len(said) == 3
    assert said[0]["read"] == 5 and said[0]["first_step"] <= time.time()
    assert all(answer["seconds"] >= 0 and answer["growth"] > 0 for answer in said[1:])


def _write(folder: Path, part: str, rows: list[dict], facts: dict = H100, small: bool = False) -> None:
    content = {"part": part, "small": small, "limit": 540, "facts": facts, "seconds": 12.0, "rows": rows}
    (folder / f"gpu_{part}.json").write_text(json.dumps(content))


def _lines(text: str) -> list[dict[str, str]]:
    table = [
        [c.strip() for c in line.strip("| \n").split(" | ")] for line in text.splitlines() if line.startswith("| ")
    ]
    return [dict(zip(HEADER, line, strict=True)) for line in table[2:]]


def _row(**more) -> dict:
    speed = {"tokens_per_second": 13000.0, "lowest": 12900.0, "highest": 13100.0}
    return {"shape": "Llama", "ranks": 1, "weights_of_token": LLAMA, **speed, **more}


def test_a_table_is_merged_from_the_parts_that_are_there(tmp_path):
    memory = {"planned": 42.85e9, "simulated": 60e9, "allocated": 42.83e9, "reserved": 45e9, "gather_checked": 0}
    _write(tmp_path, "llama8b", [_row(way="ours", first_step_seconds=60.0, load_seconds=9.0, read=16.06e9, **memory)])
    _write(tmp_path, "mistral7b", [{"way": "Unsloth", "ranks": 1, "failed": "not installed"}], small=False)
    text = write_report(tmp_path)
    assert (tmp_path / "gpu.md").read_text() == text
    assert "2 x NVIDIA H100 80GB HBM3, driver 580.1, runtime 13.0" in text and "trl 1.16" in text
    assert "Not run yet: tests, memory, peers, moe, dense32b, cards." in text
    ours, absent, *anchors = _lines(text)
    assert ours["share of peak, 4 N"] == "42.2%"
    assert ours["tokens/s a card (lowest to highest)"] == "13,000 (12,900 to 13,100)"
    assert ours["drawn a rank, GB"] == "16.06" and ours["allocated, GB"] == "42.83"
    assert "planned +0.0%" in ours["remarks"] and "simulated +40.1% (**over the goal**)" in ours["remarks"]
    assert absent["remarks"] == "not installed"
    assert [absent[key] for key in HEADER[3:-1]] == ["-"] * 10
    assert [line["part"] for line in anchors] == ["anchor"] * 3
    assert "dry run" not in text


def test_what_ran_on_a_cpu_is_marked_and_has_no_share_of_a_peak(tmp_path):
    _write(tmp_path, "llama8b", [_row(way="ours", planned=1e7)], CPU, small=True)
    _write(tmp_path, "cards", [_row(way="ours", planned=1e7)], H100, small=True)
    text = write_report(tmp_path)
    assert "marked as a dry run" in text and "no accelerator" in text
    on_cpu, tiny, *_ = _lines(text)
    assert on_cpu["remarks"] == "dry run on a CPU" and tiny["remarks"] == "tiny model"
    for line in (on_cpu, tiny):
        assert line["share of peak, 4 N"] == line["allocated, GB"] == line["reserved, GB"] == "-"


def test_no_device_has_a_share_of_a_peak_that_is_not_known(tmp_path):
    _write(tmp_path, "llama8b", [_row(way="ours")], {**H100, "device": "NVIDIA H100 PCIe"})
    assert _lines(write_report(tmp_path))[0]["share of peak, 4 N"] == "-"


def test_tests_are_counted_as_far_as_they_came():
    lines = [
        "tests/gpu/test_a.py::test_one[nf4-True] PASSED        [ 10%]\n",
        "tests/gpu/test_a.py::test_two SKIPPED (no kernel)     [ 20%]\n",
        "tests/gpu/test_b.py::test_three FAILED                [ 30%]\n",
        "tests/gpu/test_b.py::test_four ",
    ]
    assert count(lines) == ({"passed": 1, "skipped": 1, "failed": 1}, ["tests/gpu/test_b.py::test_three"])


def test_figures_of_tiny_models_are_not_for_the_committed_table(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["llama8b", "--small"])
    assert ended.value.code == 2
    assert "--small: its figures are no GPU's; give a folder for them with --out" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["lama8b"])
    assert ended.value.code == 2


def test_the_committed_table_holds_no_figure_of_a_cpu_or_of_a_tiny_model():
    for file in RESULTS.glob("gpu_*.json"):
        part = json.loads(file.read_text())
        assert part["facts"]["accelerator"] is not None and not part["small"], file
    if (RESULTS / "gpu.md").is_file():
        assert "dry run" not in (RESULTS / "gpu.md").read_text()
