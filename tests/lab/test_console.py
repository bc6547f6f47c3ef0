"""Tables and quantities as the console prints them."""

from __future__ import annotations

import pytest

from muonscale.lab.console import bytes_text, counted, seconds_text, table_text


def test_columns_of_numbers_are_aligned_to_the_right() -> None:
    rows = [("a", "1", "12 MiB", "x"), ("long name", "1,000", "", "")]
    assert table_text(rows, ("name", "n", "size", "remark")).splitlines() == [
        "name           n    size  remark",
        "a              1  12 MiB  x",
        "long name  1,000",
    ]
    assert table_text(rows[:1], indent=2) == "  a  1  12 MiB  x"


def test_a_table_is_plain_text_and_no_line_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("FORCE_COLOR", "1"), ("COLUMNS", "20"), ("TERM", "xterm-256color")):
        monkeypatch.setenv(name, value)
    wide = "[bold]" + "word " * 200
    text = table_text([(wide, "end")], ("head", "other"))
    assert "\x1b" not in text
    assert text.splitlines()[1] == f"{wide}  end"


def test_quantities_have_units_that_suit_them() -> None:
    assert [bytes_text(n) for n in (640, 12 * 2**10, 3.25 * 2**30)] == [
        "640 B", "12.00 KiB", "3.25 GiB",
    ]  # fmt: skip
    assert (seconds_text(0.0189), seconds_text(4.919)) == ("18.9 ms", "4.919 s")
    assert (counted(1, "step"), counted(2000, "batch", "batches")) == ("1 step", "2,000 batches")
