"""The table of docs/security.md names, for each hole that was found, the tests that hold it shut."""

from __future__ import annotations

from tools.security_rows import BEGIN, DOCUMENT, END, found, rows, table


def test_every_row_has_a_test():
    tests = found()
    assert [row for row in rows() if not tests[row]] == []


def test_the_document_has_the_table_as_it_is_now():
    """`python -m tools.security_rows` writes it."""
    assert BEGIN + table() + END in DOCUMENT.read_text(encoding="utf-8")
