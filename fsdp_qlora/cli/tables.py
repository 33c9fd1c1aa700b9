"""Prints tables to the terminal."""

from __future__ import annotations

import sys

from rich.table import Table

from fsdp_qlora.shown import visible
from fsdp_qlora.track.console import console


def print_table(title: str, rows: list[tuple[str, str]], width: int = 110) -> None:
    """Print a two-column table of names and values, ``width`` columns wide where there is no terminal to ask."""
    table = Table(title=visible(title), show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(visible(name), visible(value))
    console(width=None if sys.stdout.isatty() else width).print(table)


def print_columns(title: str, header: list[str], lines: list[list[str]]) -> None:
    """Print a table with a header."""
    table = Table(title=visible(title), title_justify="left")
    for name in header:  # words of a header stay whole, however narrow the table is
        table.add_column(visible(name), overflow="fold", min_width=max(map(len, name.split()), default=0))
    for line in lines:
        table.add_row(*map(visible, line))
    console(width=None if sys.stdout.isatty() else 110).print(table)
