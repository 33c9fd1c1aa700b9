"""What is printed never ends a process, and is shown as it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset
from rich.cells import cell_len
from transformers import AutoTokenizer

from fsdp_qlora.cli.show import print_samples
from fsdp_qlora.cli.tables import print_columns, print_table
from fsdp_qlora.data.loader import TokenRows
from fsdp_qlora.data.samples import segments
from fsdp_qlora.run.folder import RunFolder
from fsdp_qlora.shown import visible
from fsdp_qlora.track.console import ConsoleProgress
from fsdp_qlora.track.lines import read_lines, to_line, write_lines

TEXTS = [
    "[INST] hi [/INST]", "[/]", "[bold", "a[/b]c", ":smile: \\[x]", "你好 👩‍👩‍👧‍👦 שלום 🇳🇴 ﷽", "lone \ud83d surrogate",
    "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\rh", "\x1b[2J\x07\0", "%s {} {0} $x `y`", "",
]  # fmt: skip
"""Spellings of names, samples and answers."""

_PRINTS = """
import sys
from collections import Counter
from pathlib import Path
from fsdp_qlora.cli.output import withstand
withstand()
from fsdp_qlora.cli.tables import print_table
texts = eval(sys.argv[1])
for turn in range(40):
    print(*texts, flush=turn % 2 == 0)
    print(*texts, file=sys.stderr)
    print_table(texts[0], [(text, text) for text in texts])
with open(sys.argv[2], "w") as file:  # the lowest descriptor that is free
    print("printed")
    print("printed", file=sys.stderr)
    import contextlib, os
    with contextlib.suppress(OSError):
        os.write(1, b"printed by C code")
    file.write("kept")
"""


def _closed(*numbers: int):
    def close() -> None:
        for number in numbers:
            os.close(number)

    return close


def _program(tmp_path, cli_env, preexec=None, **settings):
    arguments = [sys.executable, "-c", _PRINTS, ascii(TEXTS), str(tmp_path / "file")]
    env = {**cli_env, **settings.pop("env", {})}
    return subprocess.run(arguments, env=env, preexec_fn=preexec, timeout=60, check=False, **settings)


@pytest.mark.parametrize("numbers", [(1,), (2,), (1, 2), (0, 1, 2), (0,)])
def test_closed_descriptors(tmp_path, cli_env, numbers):
    done = _program(tmp_path, cli_env, _closed(*numbers), stdin=subprocess.DEVNULL)
    assert done.returncode == 0 and (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "cp1252:strict"])
def test_any_encoding(tmp_path, cli_env, encoding):
    done = _program(tmp_path, cli_env, capture_output=True, env={"PYTHONIOENCODING": encoding})
    assert done.returncode == 0, done.stderr
    out = done.stdout.decode(encoding.partition(":")[0])
    assert "[INST] hi [/INST]" in out and "\\ud83d" in out
    assert "你好" in out if encoding == "utf-8" else "\\u4f60" in out


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_and_a_full_disk(tmp_path, cli_env, unbuffered):
    reads, writes = os.pipe()
    os.close(reads)
    env = {"PYTHONUNBUFFERED": unbuffered}
    done = _program(tmp_path, cli_env, stdout=writes, stderr=subprocess.PIPE, env=env)
    os.close(writes)
    assert done.returncode == 0 and b"Exception ignored" not in done.stderr and b"Traceback" not in done.stderr
    with Path("/dev/full").open("wb") as full:
        done = _program(tmp_path, cli_env, stdout=full, stderr=subprocess.PIPE, env=env)
    assert done.returncode == 0 and b"Traceback" not in done.stderr


def test_a_pipe_that_does_not_block(tmp_path, cli_env):
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    arguments = [sys.executable, "-c", _PRINTS, ascii(TEXTS), str(tmp_path / "file")]
    process = subprocess.Popen(arguments, env=cli_env, stdout=writes, stderr=subprocess.DEVNULL)
    os.close(writes)
    with os.fdopen(reads, "rb") as stream:
        assert b"[INST] hi [/INST]" in stream.read()
    assert process.wait(timeout=60) == 0


def test_a_locale_that_is_not_utf_8(cli_env, tmp_path):
    """Names in it arrive as they are, what is shown keeps its encoding, and options of the interpreter stay."""
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-B", "-m", "fsdp_qlora", "inspect", "/nowhere/é好"]
    done = subprocess.run(command, cwd=tmp_path, env={**cli_env, **ascii_only}, capture_output=True, check=False)
    assert done.returncode == 65, done.stderr
    assert b"/nowhere/\\xe9\\u597d" in done.stderr


def test_tables_show_text_as_it_is(capsys):
    """R3: what looks like the markup of a library is text."""
    print_table("[INST]", [(text, text) for text in TEXTS])
    print_columns("[/INST]", ["[b]", "[/b]"], [["[red]", ":ok:"]])
    out = capsys.readouterr().out
    for text in (
        "[INST] hi [/INST]",
        "[/]",
        "[bold",
        "a[/b]c",
        ":smile:",
        "[/b]",
        "[red]",
        ":ok:",
        "\\x1b[2J\\x07\\x00",
    ):
        assert text in out
    assert "\x1b" not in out


TABLES = {
    "a sweep": (
        ["optim.lr", "lora.r", "held-out loss", "tokens/s", "peak memory", "result"],
        [["0.0001", "8", "2.1234 -> 1.2345", "1234", "12.34 GB", "done"], ["0.1", "8", "-", "-", "-", "failed (1)"]],
    ),
    "a sweep of long keys": (
        ["train.global_batch_size", "train.activation_checkpointing", "lora.target_modules", "held-out loss", "tokens/s",
         "peak memory", "result"],
        [["16", "selective", "[q_proj,v_proj]", "2.1234 -> 1.2345", "1234", "12.34 GB", "failed (77)"]],
    ),
    "a search": (
        ["checkpointing", "offload", "rows of 2048", "planned peak", "host memory", "longest row", "most tokens",
         "tokens/s"],
        [["selective", "activations", "does not fit", "122.52 GB", "518.11 GB", "32768", "32768", "12,493"]],
    ),
}  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("table", TABLES)
def test_no_column_of_a_table_is_cut_off_at_80_columns(capsys, table):
    header, lines = TABLES[table]
    print_columns("[title]", header, lines)
    out = capsys.readouterr().out
    assert max(map(cell_len, out.splitlines())) <= 80, out
    shown = Counter(out)
    for cell in (*header, *(cell for line in lines for cell in line)):
        shown.subtract(cell.replace(" ", ""))
    lost = {letter: count for letter, count in shown.items() if count < 0}
    assert not lost, out


def test_progress_shows_text_as_it_is(capsys):
    progress = ConsoleProgress(2)
    progress.console.print("[INST] hi [/INST]")
    progress.log(1, {"bad_step": 1, "left_out": [0, 6], "reason": "[/INST] 👩"})
    assert "[INST] hi [/INST]" in (out := capsys.readouterr().out) and "[/INST] 👩" in out


@pytest.mark.parametrize("text", TEXTS)
def test_json_lines_hold_any_text(tmp_path, text):
    values = [{"text": text}, text, [text]]
    file = tmp_path / "lines.jsonl"
    write_lines(file, values)
    assert read_lines(file) == values
    assert [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]] == values
    assert to_line("é") == '"é"\n'


def test_answers_are_kept_over_evaluations_whatever_they_hold(tmp_path):
    folder = RunFolder(str(tmp_path), "r")
    folder.create()
    for step in (2, 4, 4, 6):
        folder.add_answers(step, [{"prompt": text, "answer": text} for text in TEXTS])
    lines = read_lines(folder.path / "answers.jsonl")
    assert [line["step"] for line in lines[:: len(TEXTS)]] == [2, 4, 6]
    assert [line["answer"] for line in lines[: len(TEXTS)]] == TEXTS
    folder.begin({"prompts": TEXTS})


def test_visible_leaves_lines_and_scripts():
    assert visible("a\n\tb 你好 🇳🇴") == "a\n\tb 你好 🇳🇴"
    assert visible("\x1b]0;x\x07\u2028") == "\\x1b]0;x\\x07\\u2028"


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_what_is_given_away_has_the_mode_of_a_new_file(cli_env, tmp_path, mask):
    code = (
        "import os, sys, pathlib; os.umask(int(sys.argv[2])); file = pathlib.Path(sys.argv[1]); file.touch(0o600)\n"
        "from fsdp_qlora.files.write import open_as_a_new_file; open_as_a_new_file(file)"
    )
    file = tmp_path / "weights"
    subprocess.run([sys.executable, "-c", code, str(file), str(mask)], env=cli_env, check=True)
    assert file.stat().st_mode & 0o777 == 0o666 & ~mask
    assert list(tmp_path.iterdir()) == [file]


EVIL = "\x1b]0;owned\x07\x1b[2J\r\x9b31m\u202egnp.exe\u2066"
SPELT = "\\x1b]0;owned\\x07\\x1b[2J\\r\\x9b31m\\u202egnp.exe\\u2066"


def test_nothing_that_a_terminal_obeys_is_printed_of_rows_and_names(tmp_path, capsys, tiny_model):
    """S14: of samples before training, tables, comparisons and progress."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ids = tokenizer(EVIL, add_special_tokens=False)["input_ids"]
    half = len(ids) // 2
    rows = TokenRows(Dataset.from_dict({
        "input_ids": [ids, ids], "learned": [[True] * len(ids), [n < half for n in range(len(ids))]], "source": [0, 0],
    }))  # fmt: skip
    encoder = SimpleNamespace(segments=lambda rows, number: segments(rows, number, tokenizer))
    data = SimpleNamespace(some_rows=lambda count: rows, bad_rows=None, encoder=encoder)
    config = SimpleNamespace(data=SimpleNamespace(show_samples=2))
    print_samples(SimpleNamespace(data=data, config=config, tokenizer=tokenizer), SimpleNamespace(path=tmp_path))
    print_table(EVIL, [(EVIL, EVIL)])
    print_columns(EVIL, [EVIL], [[EVIL]])
    ConsoleProgress(2).log(1, {"bad_step": 1, "left_out": [0, 6], "reason": EVIL})
    out = capsys.readouterr().out
    assert out.count(SPELT) >= 3, "whole in a sample, a table and a line of progress"
    assert visible(out) == out
