"""Curves in a terminal, as braille dots: eight to a character, with nothing but rich."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from fsdp_qlora.report.curves import Points, thin
from fsdp_qlora.report.numbers import figure

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bits of the dots of a braille character, by row and column (Unicode, block U+2800)."""
_MARK = "o"
"""A point of an evaluation."""


def chart(title: str, points: Points, width: int, height: int, held_out: Points = ()) -> Text:  # type: ignore[assignment]
    """Return a curve of ``width`` x ``height`` characters, its title and axes included.

    ``held_out`` are drawn over it as marks.
    """
    everything = [*points, *held_out]
    low, high = min(value for _, value in everything), max(value for _, value in everything)
    first, last = min(step for step, _ in everything), max(step for step, _ in everything)
    labels = [figure(high), figure(low)]
    margin = max(map(len, labels)) + 1
    columns, rows = max(8, width - margin), max(2, height - 2)

    def place(step: float, value: float, wide: int, tall: int) -> tuple[int, int]:
        x = round((step - first) / ((last - first) or 1) * (wide - 1))
        return x, round((high - value) / ((high - low) or 1) * (tall - 1))

    cells = [[0] * columns for _ in range(rows)]
    dots = [place(step, value, 2 * columns, 4 * rows) for step, value in thin(points, 4 * columns)]
    for (x, y), (to_x, to_y) in zip(dots, dots[1:] or dots, strict=False):
        for at_x, at_y in _between(x, y, to_x, to_y):
            cells[at_y // 4][at_x // 2] |= _DOTS[at_y % 4][at_x % 2]
    marks = {place(step, value, columns, rows) for step, value in held_out}
    text = Text(f"{title}\n", style="bold")
    for row, line in enumerate(cells):
        label = labels[0] if row == 0 else labels[1] if row == rows - 1 else ""
        text.append(f"{label:>{margin - 1}} ", style="dim")
        for column, bits in enumerate(line):
            marked = (column, row) in marks
            text.append(_MARK if marked else chr(0x2800 + bits), style="bold yellow" if marked else "cyan")
        text.append("\n")
    text.append(f"{'':{margin}}{f'step {first:.0f}':<{max(1, columns - 8)}}{last:>8.0f}", style="dim")
    return text


def _between(x: int, y: int, to_x: int, to_y: int) -> list[tuple[int, int]]:
    """Return the dots of a straight line."""
    count = max(abs(to_x - x), abs(to_y - y), 1)
    return [(round(x + (to_x - x) * at / count), round(y + (to_y - y) * at / count)) for at in range(count + 1)]


_LEVELS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int) -> str:
    """Return a curve of one line."""
    shown = [value for _, value in thin(list(enumerate(values)), max(2, width))][-width:]
    low, high = min(shown, default=0.0), max(shown, default=0.0)
    return "".join(_LEVELS[round((value - low) / ((high - low) or 1) * (len(_LEVELS) - 1))] for value in shown)
