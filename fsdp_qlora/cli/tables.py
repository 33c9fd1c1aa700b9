"""Prints tables to the terminal."""

from __future__ import annotations

import sys

from rich.box import HEAVY_HEAD, SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from fsdp_qlora.shown import visible
from fsdp_qlora.track.console import console

COLUMNS = 80
"""Width of what a person reads, where there is no terminal to ask."""


def print_table(title: str, rows: list[tuple[str, str]]) -> None:
    """Print a two-column table of names and values."""
    table = Table(title=visible(title), show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(visible(name), visible(value))
    _console().print(table)


def print_columns(title: str, header: list[str], lines: list[list[str]]) -> None:
    """Print a table with a header: no column is cut off, however narrow the place is.

    Where there is no room for whole words of the header, the table is printed without its frame, and where that does
    not help, words are folded.
    """
    screen = _console()
    names, cells = [visible(name) for name in header], [[visible(text) for text in line] for line in lines]
    words = [max(map(len, name.split()), default=0) for name in names]
    framed = sum(words) + 3 * len(words) + 1 <= screen.width
    room = screen.width - (3 * len(words) + 1 if framed else len(words) - 1)
    full = [max(1, *map(cell_len, column)) for column in zip(names, *cells, strict=True)]
    table = Table(box=HEAVY_HEAD if framed else SIMPLE_HEAD, padding=(0, int(framed)), show_edge=framed)
    table.title, table.title_justify = visible(title), "left"
    for name, width in zip(names, _widths(full, words, room), strict=True):
        table.add_column(name, overflow="fold", width=width)
    for line in cells:
        table.add_row(*line)
    screen.print(table)


def _widths(full: list[int], words: list[int], room: int) -> list[int]:
    """Return columns' widths that fill ``room`` at most.

    A rich table shrinks its widest column first and then widens it again to its ``min_width``, so the last columns are
    cut off. Here columns shrink to the longest word of their headers, and only then below it.

    Args:
        full: widths in which nothing is wrapped.
        words: length of the longest word of each header.
        room: the sum that there is room for.
    """
    widths = list(full)
    for least in (words, [1] * len(words)):
        while sum(widths) > room:
            spare, column = max((width - least[number], number) for number, width in enumerate(widths))
            if spare <= 0:
                break
            widths[column] -= 1
    return widths


def _console() -> Console:
    return console(width=None if sys.stdout.isatty() else COLUMNS)
