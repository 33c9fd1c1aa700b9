"""report.html: one page without scripts and without anything from outside, from one run folder or several.

Texts from runs reach the page through Jinja's autoescape alone: only the pictures, which hold none, and our own style
sheet are inserted as they are. Its Content-Security-Policy forbids scripts and requests besides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fsdp_qlora.errors import StorageError
from fsdp_qlora.files.write import write_text
from fsdp_qlora.report import details, sections
from fsdp_qlora.report.blocks import Block, Picture, cut
from fsdp_qlora.report.pictures import COLOURS, Artist
from fsdp_qlora.report.record import Run, read_run
from fsdp_qlora.shown import visible

PAGE = "report.html"
MOST_BYTES = 3_000_000
"""Size that the page stays below."""
_POINTS = (400, 120, 40, 12)
"""Points of a line in a picture, tried until the page is small enough."""
_HERE = Path(__file__).parent


def write_report(folders: Sequence[Path], file: Path) -> int:
    """Write the page of these run folders to ``file``; return its size in bytes.

    Raises:
        StorageError: if it cannot be written.
    """
    text = render([read_run(folder) for folder in folders])
    try:
        write_text(file, text)
    except OSError as error:
        raise StorageError(f"{file} cannot be written: {error.strerror}.") from error
    return len(text.encode())


def render(runs: Sequence[Run], artist: Artist | None = None) -> str:
    """Return the page, with the pictures of ``artist``."""
    labels, artist = _labels(runs), artist or Artist()
    text = ""
    for most in _POINTS:
        text = _render(runs, labels, artist, max(8, most // len(runs)))
        if len(text.encode()) < MOST_BYTES:
            break
    return text


def _labels(runs: Sequence[Run]) -> list[str]:
    """Return a short name for each run: the folder's, with as much of its path as tells it from the others."""
    paths = [run.folder.parts for run in runs]
    labels = [run.name for run in runs]
    for depth in range(2, max(map(len, paths)) + 1):
        often = Counter(labels)
        labels = [
            "/".join(parts[-depth:]) if often[label] > 1 else label
            for parts, label in zip(paths, labels, strict=True)
        ]  # fmt: skip
    return [cut(label) for label in labels]


def _render(runs: Sequence[Run], labels: Sequence[str], artist: Artist, most: int) -> str:
    overview = sections.each_run("overview", "Overview", runs, labels, artist, sections.overview)
    curves = sections.curve_section(runs, labels, artist, most)
    parts = [overview, curves] if len(runs) == 1 else [sections.comparison(runs, labels), curves, overview]
    for key, title, of in (
        ("memory", "Memory", details.memory),
        ("phases", "Phases of a step", details.phases),
        ("answers", "Answers before and after", sections.answers),
        ("data", "Data", details.data),
        ("choices", "What auto chose", details.choices),
        ("settings", "Settings", details.settings),
        ("versions", "Versions", details.versions),
        ("repeat", "How to repeat it", details.repeat),
    ):
        parts.append(sections.each_run(key, title, runs, labels, artist, of))
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, finalize=_finalized,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    title = labels[0] if len(runs) == 1 else f"{len(runs)} runs"
    return environment.get_template("page.html").render(
        title=title, labels=labels, sections=parts, css=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        svg=_svg, colours=COLOURS,
    )  # fmt: skip


def _svg(block: Block) -> Markup:
    """Return a picture as it is: it has been made of numbers and our own words."""
    assert isinstance(block, Picture)
    return Markup(block.svg or "")


def _finalized(value: Any) -> Any:
    """Show control characters and those that change the writing direction as what they are."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value
