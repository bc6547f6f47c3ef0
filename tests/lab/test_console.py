"""Tables and quantities as the console prints them."""

from __future__ import annotations

import pytest

from muonscale.lab.console import (
    bytes_text,
    counted,
    duration_text,
    is_number_column,
    seconds_text,
    si_text,
    table_text,
)


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


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.004, "0.004 s"),
        (0.97, "1 s"),
        (8.28, "8 s"),
        (59.6, "1 min"),
        (125, "2 min 5 s"),
        (3599.9, "1 h"),
        (4320, "1 h 12 min"),
        (172_800, "48 h"),
        (216_000, "2 d 12 h"),
    ],
)
def test_times_are_written_as_people_say_them(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text
    assert is_number_column([text])


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (950, "950"),
        (999.6, "1 k"),
        (8190, "8.19 k"),
        (1.2095e11, "121 G"),
        (1.2e21, "1.2e+21"),
    ],
)
def test_large_numbers_have_a_suffix(number: float, text: str) -> None:
    assert si_text(number) == text
    assert is_number_column([text])
