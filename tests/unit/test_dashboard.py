"""`fsdp-qlora watch`: follows finished, live and broken runs, on a terminal and where there is none."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from fsdp_qlora.__main__ import main
from fsdp_qlora.distributed.phases import Phases
from fsdp_qlora.distributed.watch import Outside, Watch
from fsdp_qlora.report.charts import chart, sparkline
from fsdp_qlora.report.metrics import MetricsFile
from fsdp_qlora.report.progress import progress_of
from fsdp_qlora.report.record import read_run
from tests.unit.test_report import EVIL, make_run

pytestmark = pytest.mark.full


def live(run: Path, process: int | None = None) -> Path:
    """Make a finished run one that goes on, by ``process``, at half of its steps."""
    for name in ("summary", "exit"):
        (run / f"{name}.json").unlink()
    start = json.loads((run / "start.json").read_text()) | {"time": time.time() - 60, "total_steps": 12}
    (run / "start.json").write_text(json.dumps(start))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][:-1]
    for line in lines:
        line["time"] = time.time() - 10 * (6 - line["step"])
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / ".lock.holder").write_text(f"process {process or os.getpid()} on {socket.gethostname()}, since now\n")
    return run


def test_lines_of_a_finished_a_broken_and_a_killed_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "a" / "finished")
    broken = make_run(tmp_path / "a" / "broken")
    (broken / "summary.json").unlink()
    (broken / "exit.json").write_text(
        json.dumps({"code": 1, "rank": 1, "message": "no memory\x1b[2J", "time": 1e9 + 9})
    )
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    ended = subprocess.Popen(["true"])
    ended.wait()
    live(make_run(tmp_path / "a" / "killed"), ended.pid)
    assert main(["watch", str(tmp_path / "a")]) == 0, "all have ended, so it ends by itself"
    said = capsys.readouterr().out
    assert "finished: finished, step 6/6, loss 2.9940" in said and "held-out loss 2.0000" in said
    assert "broken: failed with exit code 1" in said and "no memory\\x1b[2J" in said and "\x1b" not in said
    assert "killed: killed: it ended without saying why, step 6/12" in said


def test_a_live_run_is_followed_until_it_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = live(make_run(tmp_path / "run"))
    progress = progress_of(read_run(run), time.time())
    assert (progress.state, progress.runs, progress.step, progress.total) == ("running", True, 6, 12)
    assert progress.left == pytest.approx(60, abs=3), "10 s a step, 6 to go"

    def go_on() -> None:
        for step in range(7, 13):
            time.sleep(0.3)
            with (run / "metrics.jsonl").open("a") as file:
                file.write(
                    json.dumps({"time": time.time(), "step": step, "loss": 1.0 * step, "tokens_per_second": 5}) + "\n"
                )
        (run / "exit.json").write_text(json.dumps({"code": 75, "rank": 0, "message": "", "time": time.time()}))

    writer = threading.Thread(target=go_on)
    writer.start()
    assert main(["watch", str(run), "every=0.1"]) == 0
    writer.join()
    lines = capsys.readouterr().out.splitlines()
    assert "step 6/12" in lines[0] and "left" in lines[0]
    assert "stopped by a signal" in lines[-1] and "step 12/12, loss 12.0" in lines[-1] and len(lines) >= 4


def on_terminal(words: list[str], term: str, until: str, interrupt: bool = False) -> tuple[int, str]:
    """Run ``watch`` on a pseudo-terminal until it has printed ``until``; return its exit code and what it printed."""
    here, there = pty.openpty()
    env = {**os.environ, "TERM": term, "COLUMNS": "100", "LINES": "40", "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, "-m", "fsdp_qlora", "watch", *words]
    process = subprocess.Popen(command, stdin=there, stdout=there, stderr=there, env=env, start_new_session=True)
    os.close(there)
    text, deadline = "", time.monotonic() + 120
    while time.monotonic() < deadline:
        if select.select([here], [], [], 0.2)[0]:
            try:
                block = os.read(here, 65536)
            except OSError:  # the other end is closed
                break
            text += block.decode(errors="replace")
            if interrupt and until in text:
                process.send_signal(signal.SIGINT)
                interrupt = False
        elif process.poll() is not None:
            break
    os.close(here)
    return process.wait(30), text


def test_a_terminal_shows_the_dashboard_and_ctrl_c_leaves_it(tmp_path: Path) -> None:
    run = live(make_run(tmp_path / "run", evil=EVIL + "[bold]\x1b[31m"))
    told = [
        {"rank": n, "doing": f"step 7, update{n}", "since": time.time() - 5, "saving": "", "silent_seconds": 9.0 * n}
        for n in range(12)
    ]
    (run / "ranks.json").write_text(json.dumps({"time": time.time(), "ranks": told}))
    (run / "messages.jsonl").write_text(json.dumps({"time": time.time(), "message": f"careful{EVIL}\x1b[31m"}) + "\n")
    code, text = on_terminal([str(run)], "xterm-256color", "the run goes on", interrupt=True)
    assert code == 0 and "Traceback" not in text
    for shown in (
        "step 6/12",
        "loss (o: held out)",
        "tokens/s",
        "step 7, update11",
        "99 s",
        "and 4 more",
        "careful<script>",
    ):
        assert shown in text, shown
    assert "\x1b[31m" not in text, "a message's control characters reached the terminal"


def test_a_dumb_terminal_gets_lines(tmp_path: Path) -> None:
    code, text = on_terminal([str(make_run(tmp_path / "run"))], "dumb", "finished")
    assert code == 0 and "\x1b" not in text and "run: finished, step 6/6" in text


def test_wrong_words_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(make_run(tmp_path / "run"))
    for words in (
        [],
        [run, run],
        [run, "every=0"],
        [run, "every=x"],
        [run, "once=maybe"],
        [run, "--fast"],
        ["/nowhere"],
    ):
        assert main(["watch", *words]) == 2
        assert capsys.readouterr().err.startswith("fsdp-qlora: watch: ")
    for verb in ("watch", "report"):
        assert main([verb, "--help"]) == 0
        assert f"usage: fsdp-qlora {verb} RUN" in capsys.readouterr().out


def test_a_file_that_a_resume_cuts_back_is_read_anew(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, 9)]
    file.write_text("".join(lines) + lines[0][:5])
    follower = MetricsFile(file)
    assert len(follower.poll().steps) == 8 and len(follower.poll().steps) == 8
    with file.open("a") as stream:
        stream.write(lines[0][5:])
    assert len(follower.poll().steps) == 9 and follower.metrics.unreadable == 0, "the part of a line was put together"
    (tmp_path / "new").write_text("".join(lines[:4]))
    (tmp_path / "new").replace(file)
    assert follower.poll().last_step == 4 and len(follower.metrics.steps) == 4


def test_charts_have_the_size_asked_for() -> None:
    text = chart("loss", [(step, 1 / step) for step in range(1, 500)], 60, 8, [(10, 0.5)]).plain.split("\n")
    assert len(text) == 8 and max(map(len, text)) <= 60 and sum(line.count("o") for line in text[1:]) == 1
    assert len(sparkline([1.0, 2.0, 3.0] * 50, 20)) <= 20 and sparkline([], 20) == "" and sparkline([5.0], 9) == "▁"
    assert "⠀" in chart("flat", [(3, 1.0)], 30, 4).plain


def test_rank_0_tells_what_all_ranks_do() -> None:
    """And whatever its disk does, nobody is held up."""
    main_thread = Phases(name="step 3, update", number=7)
    watch = Watch(SimpleNamespace(rank=0, size=1, phases=main_thread, saving=Phases(name="")), 600.0)
    note = {"main": [6, "step 3, micro-batch 1 of 2", 5.0], "saving": [0, "", 1.0], "beat": 4}
    watch._board = SimpleNamespace(read=lambda name: json.dumps(note), write=lambda name, text: None)
    watch._size = 2
    told = []
    watch._told -= 60
    watch._tell(Outside(lambda: None, lambda: None, lambda last: None, told.append))
    assert [(each["rank"], each["doing"]) for each in told[0]] == [
        (0, "step 3, update"),
        (1, "step 3, micro-batch 1 of 2"),
    ]

    def full(states: object) -> None:
        raise OSError(28, "No space left on device")

    watch._told -= 60
    watch._tell(Outside(lambda: None, lambda: None, lambda last: None, full))
