"""A tracker that fails, hangs or meets a full disk costs a run one warning."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from fsdp_qlora.config.rules import check
from fsdp_qlora.config.schema import from_dict
from fsdp_qlora.errors import ConfigError
from fsdp_qlora.track.behind import Behind
from fsdp_qlora.track.sink import Ended, Sink, State

FINISHED = Ended(State.FINISHED)


class Faulty(Sink):
    """Fails, or waits for ever, at one of its calls; remembers the others."""

    def __init__(self, at: str = "", wait: threading.Event | None = None) -> None:
        self._at, self._wait, self.taken = at, wait, []
        self._call("open")

    def _call(self, name, *what):
        if name == self._at and self._wait is None:
            raise OSError(28, "No space left on device")
        if name == self._at:
            self._wait.wait()
        self.taken.append((name, *what))

    def log(self, step, values):
        self._call("log", step)

    def rewind(self, step):
        self._call("rewind", step)

    def close(self):
        self._call("close")

    def end(self, ended):
        self._call("end", ended.state)


def drive(sink: Behind, ended: Ended = FINISHED) -> None:
    for step in (1, 2, 3):
        sink.log(step, {"loss": 1.0})
    sink.rewind(1)
    sink.log(2, {"loss": 1.0})
    sink.close()
    sink.end(ended)


@pytest.mark.parametrize("at", ["open", "log", "rewind", "close", "end"])
def test_a_tracker_that_fails_at_any_call_is_reported_once(capsys, at):
    drive(Behind("track=x", lambda: Faulty(at)))
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "track=x failed" in err and "No space left on device" in err


@pytest.mark.full
@pytest.mark.parametrize("at", ["log", "rewind", "close", "end"])
def test_a_tracker_that_hangs_is_left_behind(capsys, at):
    never = threading.Event()
    started = time.monotonic()
    drive(Behind("track=x", lambda: Faulty(at, never), last_seconds=0.5))
    assert time.monotonic() - started < 5
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "it has not taken the last values within" in err
    never.set()


@pytest.mark.full
def test_a_tracker_gets_every_call_in_order(capsys):
    sink = Faulty()
    drive(Behind("track=x", lambda: sink), Ended(State.STOPPED))
    calls = [("log", 1), ("log", 2), ("log", 3), ("rewind", 1), ("log", 2), ("close",), ("end", State.STOPPED)]
    assert sink.taken == [("open",), *calls] and not capsys.readouterr().err


_FULL = """
import resource, sys
from pathlib import Path
from fsdp_qlora.track.behind import Behind
from fsdp_qlora.track.sink import Ended, State
from fsdp_qlora.track.tensorboard import TensorBoardSink
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sink = Behind("track=tensorboard", lambda: TensorBoardSink(Path(sys.argv[1]), {}, 0))
for step in range(1000):
    sink.log(step, {"loss": 1.0})
sink.close()
sink.end(Ended(State.FINISHED))
"""


@pytest.mark.full
def test_event_files_that_cannot_grow_cost_one_warning(cli_env, tmp_path):
    pytest.importorskip("tensorboard", reason="needs the package tensorboard: pip install 'fsdp-qlora[tensorboard]'")
    command = [sys.executable, "-c", _FULL, str(tmp_path)]
    done = subprocess.run(command, env=cli_env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("track=tensorboard failed") == 1 and "File too large" in done.stderr, done.stderr


_ABSENT = """
import sys
sys.modules["tensorboard"] = None  # as if it were not installed
from fsdp_qlora.__main__ import main
code = main(["train", "track=[console,tensorboard]", "model.name=x", "data.train=y"])
assert "torch" not in sys.modules
sys.exit(code)
"""


@pytest.mark.full
def test_a_tracker_without_its_package_is_refused_before_torch_is_imported(cli_env, tmp_path):
    done = subprocess.run([sys.executable, "-c", _ABSENT], env=cli_env, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "track: tensorboard needs tensorboard, not installed here" in done.stderr
    assert "pip install 'fsdp-qlora[tensorboard]'" in done.stderr


@pytest.mark.full
def test_an_unknown_tracker_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"track\.to: 'wandbb' is not one of .* Did you mean 'wandb'"):
        check(from_dict({"track": {"to": {"wandbb": True}}}))
    assert from_dict({"track": {"to": {"wandb": True, "tensorboard": False}}}).track.names == ["console", "wandb"]
    assert from_dict({"track": {"to": {"console": False}}}).track.names == []
