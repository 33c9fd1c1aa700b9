"""Bars: on a terminal one block for all, elsewhere a line now and then, with the time left; silent as a library."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from fsdp_qlora.track.bars import LINE_SECONDS, Bar, Screen, counted


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def screen(shown: bool = True) -> Screen:
    made = Screen()
    made.shown = shown
    return made


def test_where_there_is_no_terminal_a_line_comes_now_and_then_with_the_time_left(capsys):
    clock = Clock()
    bar = Bar("loading", screen(), clock=clock)
    for done in range(101):
        bar(done, 100)
        clock.now += 1.0
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["loading 30/100, 1:10 left", "loading 60/100, 0:40 left", "loading 90/100, 0:10 left"]


@pytest.mark.full
def test_short_work_and_a_library_say_nothing(capsys):
    clock = Clock()
    short, silent = Bar("loading", screen(), clock=clock), Bar("loading", screen(shown=False), clock=clock)
    for done in range(5):
        short(done, 4)
        clock.now += LINE_SECONDS / 5
    for done in range(5):
        silent(done, 4)
        clock.now += LINE_SECONDS
    assert capsys.readouterr() == ("", "")


@pytest.mark.full
def test_without_a_total_the_count_is_shown_alone(capsys):
    clock = Clock()
    bar = Bar("tokenizing rows", screen(), clock=clock)
    for done in (0, 1000, 2000):
        bar(done, 0)
        clock.now += LINE_SECONDS
    assert capsys.readouterr().err.splitlines() == ["tokenizing rows 1000", "tokenizing rows 2000"]


@pytest.mark.full
def test_items_are_passed_on_as_they_are():
    assert list(counted(iter("abc"), "evaluating", 3, shown=True)) == list("abc")
    assert list(counted(iter("abc"), "evaluating", 3, shown=False)) == list("abc")


_ON_A_TERMINAL = """
from fsdp_qlora.track.bars import Bar, counted, show_bars
from fsdp_qlora.track.console import ConsoleProgress
show_bars()
bar = Bar("loading and quantizing")
for done in range(1, 6):
    bar(done, 5)
steps = ConsoleProgress(3)
values = {"loss": 1.5, "grad_norm": 1.0, "lr": 1e-3, "tokens_per_second": 10.0, "peak_memory_bytes": 1e6}
for step in (1, 2, 3):
    steps.log(step, values)
    for _ in counted(range(4), "evaluating", 4, shown=True):
        print("a line of somebody else's")
    steps.log(step, {"eval_loss": 2.5})
steps.close()
print("the end")
"""


@pytest.mark.full
def test_on_a_terminal_all_bars_share_one_block_and_leave_the_cursor(cli_env):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", _ON_A_TERMINAL]
    env = {**cli_env, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(command, env=env, stdout=theirs, stderr=theirs)
    os.close(theirs)
    text = b""
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not data:
            break
        text += data
    assert process.wait() == 0, text.decode()
    shown = text.decode()
    assert (
        "loading and quantizing" in shown and "5/5" in shown and "evaluating" in shown and "eval loss 2.5000" in shown
    )
    assert shown.count("a line of somebody else's") == 12 and shown.rstrip().endswith("the end")
    assert "\x1b[?25l" not in shown, "the cursor is hidden"
    assert shown.rindex("3/3") > shown.rindex("evaluating"), "the last block on the screen is the steps' alone"
