"""The words that docs and docstrings avoid are found where they are prose, and only there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import check_words


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(check_words, "ROOT", tmp_path)

    def write(name: str, text: str) -> Path:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


@pytest.mark.parametrize(
    "word",
    [
        "alike",
        "Colour",
        "normalised",
        "centre",
        "heard",
        "told apart",
        "Behaviour",
        "Accepted are x",
    ],
)
def test_a_word_is_found_in_docstrings_comments_strings_and_pages(word: str, write) -> None:
    text = f'"""{word}."""\nx = f"{word} {{1}}"  # {word}\n'
    lines = [place.split(":")[1] for place in check_words.check(write("a.py", text))]
    assert lines == ["1", "2", "2"]
    assert len(list(check_words.check(write("a.md", f"One.\n\n{word} here\n")))) == 1


def test_code_is_not_prose(write) -> None:
    page = "`centre`\n\n```sh\nset centre=1\n```\n[x](colour.md) https://a.b/colour\n"
    assert not list(check_words.check(write("a.md", page)))
    assert not list(check_words.check(write("a.py", "centre = heard = 1\n")))
    assert not list(check_words.check(write("a.py", '"""Shears are unlike alikeness."""\n')))


def test_the_exit_status_says_whether_there_is_one(write, capsys) -> None:
    assert check_words.main([str(write("a.md", "the same\n"))]) == 0
    assert check_words.main([str(write("a.md", "alike\n"))]) == 1
    assert "a.md:1" in capsys.readouterr().out


def test_long_lines_of_prose_are_found_but_not_tables(write) -> None:
    long = "word " * 25
    assert len(list(check_words.check(write("a.md", f"{long}\n\n| {long} |\n\n# {long}\n")))) == 1
