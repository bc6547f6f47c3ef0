"""What docs/fits.md shows is what the command prints, and its lines of Python run."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import Muonscale

DOCS = (Path(__file__).parents[3] / "docs" / "fits.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", DOCS, flags=re.M | re.S)
    return found


def test_the_example_prints_what_the_page_shows(
    muonscale: Muonscale, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs.csv").write_text(block("csv"))
    monkeypatch.chdir(tmp_path)
    command = re.search(r"`muonscale (fit scaling [^`]*)` prints", DOCS)
    assert command
    assert muonscale(*command[1].split()).out == block("text")


def test_the_lines_of_python_run(capsys: pytest.CaptureFixture[str]) -> None:
    n, d = map(np.ravel, np.meshgrid(np.geomspace(4e7, 4e9, 5), np.geomspace(1e9, 1e11, 5)))
    rates = np.geomspace(1e-3, 1e-1, 25)
    tokens = np.geomspace(1e6, 1e9, 25)
    names = {
        "parameters": n,
        "tokens": d,
        "losses": 1.69 + 406.4 / n**0.34 + 410.7 / d**0.28,
        "tokens_so_far": tokens,
        "validation_losses": 50 * tokens**-0.13,
    }
    first, second = block("python").split("\n\n")[-2:]
    head = block("python").split("\n\n")[0]
    exec(head + "\n" + first, names)
    names |= {"learning_rates": rates, "losses": 3 + np.log(rates / 0.01) ** 2}
    exec(second, names)
    lines = capsys.readouterr().out.splitlines()
    assert float(lines[0].split()[0]) == pytest.approx(0.34)
    assert "extrapolated=True" in lines[0]
    assert float(lines[2]) == pytest.approx(0.01) and lines[3] == "> 1e+09"
