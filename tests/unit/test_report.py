"""`fsdp-qlora report`: one page from run folders, whatever they hold; nothing of it becomes markup."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fsdp_qlora.__main__ import main
from fsdp_qlora.report.page import MOST_BYTES, render, write_report
from fsdp_qlora.report.pictures import Artist, can_draw
from fsdp_qlora.report.record import read_run, run_folders

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{7*7}}</style></textarea><!--"
ALLOWED = {
    "html", "head", "meta", "title", "style", "body", "a", "header", "h1", "h2", "h3", "nav", "ul", "li", "main",
    "section", "div", "p", "table", "caption", "thead", "tbody", "tr", "th", "td", "details", "summary", "figure",
    "figcaption", "span", "pre", "code", "dl", "dt", "dd", "mark", "svg", "g", "defs", "path", "use", "text", "rect",
    "clippath",
}  # fmt: skip


class Page(HTMLParser):
    """What a browser would see."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.text = "".join(self.texts)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def make_run(folder: Path, lr: float = 1e-3, steps: int = 6, evil: str = "", **summary: Any) -> Path:
    """Write the folder of a finished run; ``evil`` is put wherever a stranger's text can come."""
    folder.mkdir(parents=True)
    names = [f"rows{evil}.jsonl", "more.jsonl"]
    config = {
        "run": {"name": folder.name},
        "optim": {"lr": lr},
        "data": {"train": names},
        "model": {"name": f"m{evil}"},
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    lines = [{"time": 1e9, "step": 0, "eval_loss": 3.0, "eval_loss_by_source": dict.fromkeys(names, 3.0)}]
    lines += [
        {"time": 1e9 + step, "step": step, "loss": 3 - lr * step, "grad_norm": 0.5, "lr": lr, "tokens": 10 * step,
         "tokens_per_second": 10.0, "step_seconds": 1.0, "peak_memory_bytes": 10**9 + step}
        for step in range(1, steps + 1)
    ]  # fmt: skip
    lines.append({"time": 2e9, "step": steps, "eval_loss": 2.0, "eval_loss_by_source": dict.fromkeys(names, 2.0)})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sample = {"prompt": f"who?{evil}", "before": f"a{evil}", "after": f"b{evil}"}
    ranks = [{"rank": 0, "peak_memory_bytes": 10**9, "bytes_read": 5}]
    phases = {"gemm": 0.7, "waiting": 0.3, evil or "else": 1}
    counts = {"rows": 9, "kept": 8, "truncated": 1, "tokens": 100, "target_tokens": 40}
    lengths = {
        "median": 4,
        "longer_than_95_percent": 7,
        "longest": 9,
        "histogram": {"edges": [1, 5, 10], "counts": [5, 3]},
    }
    files = {
        "summary": {
            "steps": steps, "tokens_per_second": 10.0, "samples": [sample], "ranks": ranks, "memory_kind": "VmHWM",
            "process_bytes": 5 * 10**8, "profile": {"ranks": [{"rank": 0, "step_seconds": 1.0, "phases": phases}]},
            "trainable_parameters": 5, "adapter_bytes": 9, "verdict": {"word": f"learned{evil}"}, **summary,
        },
        "start": {
            "time": 1e9, "total_steps": steps, "world_size": 1, "auto": {f"k{evil}": {"value": f"v{evil}", "why": f"w{evil}"}},
            "plan": {"peak_planned_bytes": 6 * 10**8, "bytes_per_rank": {"adapters": 5}, "bytes_at_moment": {"head": 6}},
            "process_bytes": 5 * 10**8, "data": {"train": names, "training_rows": counts, "held_out_rows": counts, "lengths": lengths},
        },
        "versions": {"python": "3.11.7", f"torch{evil}": f"2.13{evil}"},
        "exit": {"code": 0, "rank": 0, "message": f"said{evil}" if evil else "", "time": 1e9 + steps},
    }  # fmt: skip
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    segments = [[{"text": f"<|user|>{evil}", "learned": False}, {"text": f"answer{evil}", "learned": True}]]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in segments))
    (folder / "answers.jsonl").write_text(json.dumps({"step": 3, "prompt": evil, "answer": evil}) + "\n")
    return folder


def test_a_row_that_holds_a_script_shows_as_text(tmp_path: Path) -> None:
    """S24: no text of a run, whatever file it stands in, becomes markup; the page asks for nothing from outside."""
    run = make_run(tmp_path / "<b>run<b>", evil=EVIL)
    text = render([read_run(run), read_run(make_run(tmp_path / "other"))])
    page = Page(text)
    assert page.tags.keys() <= ALLOWED
    assert page.tags["style"] == 1 and page.text.count(EVIL) > 10
    assert "49" not in page.text.replace(EVIL, "").split()
    for name, value in page.attributes:
        assert not name.startswith("on") and name not in ("src", "srcdoc", "action")
        assert name != "href" or value.startswith("#")
    assert "default-src 'none'" in dict(page.attributes).get("content", "") or "default-src 'none'" in text
    assert "url(" not in re.sub(r"url\(#[\w-]+\)", "", text)


def test_several_runs_and_damaged_lines(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "sweep" / "a"), make_run(tmp_path / "sweep" / "b", lr=2e-3)
    with (second / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss"\n[1]\n{"step": "x", "loss": 1}\n{"step": 8, "loss": NaN}\n{"step": 9, "lo')
    assert run_folders([str(tmp_path / "sweep")], "report") == [first, second]
    page = Page(render([read_run(first), read_run(second)], Artist(False)))
    assert "3 lines are damaged" in page.text
    assert re.search(r"optim\.lr\s*0\.001\s*0\.002", page.text), "what differs is not there"
    assert '{"lr": ' not in page.text, "a group is no setting"
    assert "a: training" in page.text and "b: held out" in page.text
    for section in (
        "Comparison",
        "Curves",
        "Memory",
        "Phases of a step",
        "Data",
        "Settings",
        "Versions",
        "What auto chose",
    ):
        assert section in page.texts
    assert main(["report", str(first), str(second), f"to={tmp_path / 'both.html'}"]) == 0
    assert (tmp_path / "both.html").stat().st_size < MOST_BYTES


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photos").mkdir()
    for words in (["report", str(tmp_path / "photos")], ["report", str(tmp_path / "gone")], ["report"]):
        assert main(words) == 2
        said = capsys.readouterr().err.strip()
        assert said.startswith("fsdp-qlora: report: ") and "Traceback" not in said
        assert words[1:] == [] or words[1] in said


STRANGE = [None, True, -1, 1e308, 10**400, "x", "", [], [1, "x"], {}, {"a": {"b": [None]}}, [[{}]], float("nan")]


@pytest.mark.full
@pytest.mark.parametrize("name", ["summary", "start", "versions", "exit", "plan", "ranks"])
def test_files_of_any_form_make_a_page(tmp_path: Path, name: str) -> None:
    """Each value of a file, one after the other, is replaced by values of other types."""
    run = make_run(tmp_path / "run")
    (run / "plan.json").write_text('{"peak_simulated_bytes": 5}')
    (run / "ranks.json").write_text('{"ranks": [{"rank": 0}]}')
    whole = json.loads((run / f"{name}.json").read_text())

    def variants(value: Any) -> Any:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from ({**value, key: changed} for changed in variants(inner))
        elif isinstance(value, list) and value:
            yield from ([changed, *value[1:]] for changed in variants(value[0]))
        yield from STRANGE

    count = 0
    for changed in variants(whole):
        (run / f"{name}.json").write_text(json.dumps(changed))
        assert "How to repeat it" in render([read_run(run)], Artist(False))
        count += 1
    assert count > 20


@pytest.mark.full
@pytest.mark.skipif(not can_draw(), reason="needs matplotlib (the extra `report`)")
def test_pictures_have_ids_of_their_own_and_the_colours_of_the_page(tmp_path: Path) -> None:
    text = render([read_run(make_run(tmp_path / name)) for name in "ab"])
    page = Page(text)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) and page.tags["svg"] > 8
    assert "#fedc" not in text and "var(--plot-10)" in text and "var(--plot-11)" in text
    wanted = {value[1:] for name, value in page.attributes if name == "href"}
    assert wanted <= set(ids)
    labels = [value for name, value in page.attributes if name == "aria-label"]
    assert any(label.startswith("Loss. a: training: 2.9990 at step 1, 2.9940 at step 6") for label in labels)


@pytest.mark.full
def test_many_long_runs_stay_small(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"run{at}", lr=1e-6 * at, steps=5_000) for at in range(8)]
    assert write_report(runs, tmp_path / "page.html") < MOST_BYTES


@pytest.mark.full
def test_neither_verb_imports_torch(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    code = (
        "import sys; from fsdp_qlora.__main__ import main; code = main(sys.argv[1:]); "
        "print(sorted({'torch', 'transformers', 'hydra', 'datasets'} & sys.modules.keys())); sys.exit(code)"
    )
    for words in (["watch", str(run)], ["report", str(run)]):
        ran = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.splitlines()[-1] == "[]"
    assert (run / "report.html").is_file()
