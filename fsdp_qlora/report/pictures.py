"""Pictures as inline SVG, drawn by matplotlib; None where it is not installed.

A picture holds numbers and our own words only, never a name or a text from a run: those are in the page, which escapes
them. Its colours are CSS variables, so that one picture serves a light and a dark page.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from itertools import pairwise
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from fsdp_qlora.files.home import cache_folder
from fsdp_qlora.report.curves import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INSTALL = "pip install 'fsdp-qlora[report]'"
COLOURS = 8
"""Colours of series in page.css; the next ones have the same colours with other dashes."""
_DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
_WIDTH = 3.9
"""Inches of a picture: in a column of the page, and on a telephone, its letters have about the size of the text's."""
_INK, _FAINT = "#fedc00", "#fedc01"
_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "fsdp_qlora", "text.parse_math": False, "font.size": 8.5,
    "axes.edgecolor": _INK, "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK, "text.color": _INK,
    "grid.color": _FAINT, "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False,
    "axes.spines.right": False, "lines.linewidth": 1.5, "lines.markersize": 4, "figure.facecolor": "none",
    "axes.facecolor": "none", "axes.formatter.useoffset": False, "axes.formatter.limits": (-3, 5),
}  # fmt: skip


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


class Artist:
    """Draws the pictures of a page as SVG elements."""

    def __init__(self, draws: bool | None = None) -> None:
        """Draw if ``draws``; None asks whether matplotlib is installed."""
        self.draws = can_draw() if draws is None else draws

    def curve(self, curve: Curve, name: str, summary: str) -> str | None:
        """Return a curve over the steps; ``name`` is unique in the page. None where nothing can be drawn."""

        def fill(axes: Axes) -> None:
            from matplotlib.ticker import MaxNLocator

            for series in curve.series:
                steps, values = zip(*series.points, strict=True)
                dashes = _DASHES[series.colour // COLOURS % len(_DASHES)]
                marker = "o" if series.held_out or len(steps) == 1 else ""
                style = (0, (2, 1.5)) if series.held_out else dashes
                axes.plot(steps, values, color=_colour(series.colour), linestyle=style, marker=marker)
            axes.set_xlabel("step")
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
            if curve.unit:
                axes.set_ylabel(curve.unit)

        return _draw(fill, name, summary) if self.draws else None

    def bars(self, values: Mapping[str, float], unit: str, name: str, summary: str) -> str | None:
        """Return horizontal bars, whose names are words of ours; None where nothing can be drawn."""

        def fill(axes: Axes) -> None:
            bars = axes.barh(list(values), list(values.values()), color=[_colour(n) for n in range(len(values))])
            axes.bar_label(bars, fmt="%.3g", padding=3)
            axes.margins(x=0.14)
            axes.invert_yaxis()
            axes.grid(visible=False, axis="y")
            axes.set_xlabel(unit)

        longest = max(map(len, values), default=0)
        return _draw(fill, name, summary, 0.62 + 0.27 * len(values), 0.15 + 0.075 * longest) if self.draws else None

    def histogram(
        self, edges: Sequence[float], counts: Sequence[float], unit: str, name: str, summary: str
    ) -> str | None:
        """Return the numbers of rows between edges; None where nothing can be drawn."""

        def fill(axes: Axes) -> None:
            widths = [b - a for a, b in pairwise(edges)]
            axes.bar(edges[:-1], counts, width=widths, align="edge", color=_colour(0), edgecolor=_FAINT)
            axes.grid(visible=False, axis="x")
            axes.set_xlabel(unit)
            axes.set_ylabel("rows")

        return _draw(fill, name, summary) if self.draws else None


def _colour(number: int) -> str:
    return f"#fedc{16 + number % COLOURS:02x}"


def _draw(fill: Callable[[Axes], None], name: str, summary: str, height: float = 2.25, left: float = 0.68) -> str:
    """Return what ``fill`` draws; ``height`` of the picture and ``left`` of its axes are inches."""
    os.environ.setdefault("MPLCONFIGDIR", str(cache_folder() / "matplotlib"))  # its list of fonts
    from matplotlib import rc_context, rcdefaults
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context():
        rcdefaults()  # whatever the user's matplotlibrc says
        with rc_context(_STYLE):
            figure = Figure(figsize=(_WIDTH, height))
            # Set by hand: matplotlib's layout engines draw everything twice to measure it.
            edges = (left / _WIDTH, 0.44 / height, 1 - (left + 0.12) / _WIDTH, 1 - 0.6 / height)
            fill(figure.add_axes(edges))
            text = io.StringIO()
            FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None})
    return _inline(text.getvalue(), name, summary)


def _inline(text: str, name: str, summary: str) -> str:
    """Return matplotlib's SVG as an element of the page: ids of its own, CSS variables for colours, no style sheet."""
    root = ElementTree.fromstring(text)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{_SVG}metadata", f"{_SVG}style"):
                parent.remove(child)
    for node in root.iter():
        node.tag = node.tag.removeprefix(_SVG)
        if "id" in node.attrib:
            node.set("id", f"{name}-{node.get('id')}")
        if _LINK in node.attrib:
            node.set("href", f"#{name}-{node.attrib.pop(_LINK).removeprefix('#')}")
        for key in ("style", "clip-path"):
            if key in node.attrib:
                value = re.sub(r"url\(#", f"url(#{name}-", node.attrib[key])
                value = re.sub(r"font-family: [^;]*;? ?", "", value)
                node.set(key, re.sub(r"#fedc([0-9a-f]{2})", r"var(--plot-\1)", value))
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    root.set("aria-label", summary)
    root.set("class", "plot")
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=True)
