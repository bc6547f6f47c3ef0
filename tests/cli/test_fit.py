from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import Muonscale

FLOPS = np.geomspace(1e18, 3e20, 6)


@pytest.fixture
def ladder(tmp_path: Path) -> Path:
    """Muon takes half of AdamW's FLOPs."""
    rng = np.random.default_rng(0)
    lines = ["optimizer,flops,loss"]
    for name, factor in (("muon", 0.5), ("adamw", 1.0)):
        loss = 27 * (FLOPS / factor) ** -0.052 * np.exp(0.001 * rng.standard_normal(6))
        lines += [f"{name},{c:.6g},{value:.5f}" for c, value in zip(FLOPS, loss, strict=True)]
    path = tmp_path / "runs.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def steps(tmp_path: Path) -> Path:
    batch = 2 ** np.arange(14, 20)
    rng = np.random.default_rng(0)
    values = (900 + 9e7 / batch) * np.exp(0.01 * rng.standard_normal(6))
    rows = [f"{b},{s:.0f}" for b, s in zip(batch, values, strict=True)]
    path = tmp_path / "steps.csv"
    path.write_text("\n".join(["batch,steps", *rows]) + "\n")
    return path


def test_fit_scaling_prints_laws_and_their_ratio(muonscale: Muonscale, ladder: Path) -> None:
    answer = muonscale("fit", "scaling", ladder, "--at", "1e21", "--resamples", "200")
    assert answer.code == 0, answer.err
    for said in (
        "90 % intervals from 200 resamples (seed 0)",
        "muon: 6 runs, converged",
        "loss at C = 1e+21",
        "extrapolated",
        "muon / adamw: FLOPs at equal loss",
        "error without C = 3e+20",
    ):
        assert said in answer.out


def test_fit_scaling_prints_json(muonscale: Muonscale, ladder: Path) -> None:
    words = ["--json", "--resamples", "100", "--seed", "3", "--reference", "muon"]
    answer = muonscale("fit", "scaling", ladder, "--law", "compute", "--by", "optimizer", *words)
    tree = json.loads(answer.out)
    assert (tree["seed"], tree["resamples"]) == (3, 100)
    assert tree["ratios"][0]["first"] == "adamw"
    assert 1.5 < tree["ratios"][0]["rows"][2]["value"] < 2.5


def test_fit_batch_prints_the_critical_batch(muonscale: Muonscale, steps: Path) -> None:
    answer = muonscale("fit", "batch", steps, "--base", "32768", "--resamples", "100")
    assert answer.code == 0, answer.err
    assert "critical batch Emin/Smin" in answer.out
    assert "batch with 20 % more data than 3.277e+04" in answer.out
    critical = next(line for line in answer.out.splitlines() if "critical" in line)
    assert float(critical.split()[3]) == pytest.approx(1e5, rel=0.1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["scaling", "nowhere.csv"], "nowhere.csv: No such file"),
        (["scaling", "{ladder}", "--law", "chinchilla"], "no column for parameters"),
        (["scaling", "{ladder}", "--law", "power"], "'power'"),
        (["scaling", "{ladder}", "--law", "regimes"], "'regimes'"),
        (["scaling", "{ladder}", "--by", "optimiser"], "did you mean optimizer"),
        (["batch", "{ladder}"], "no column for batch"),
        (["scaling", "{ladder}", "--at", "-1"], "-1"),
        (["batch", "{steps}", "--base", "0"], "batch size 0"),
    ],
)
def test_a_mistake_gets_a_sentence_and_exit_code_2(
    words: list[str], said: str, muonscale: Muonscale, ladder: Path, steps: Path
) -> None:
    paths = {"{ladder}": str(ladder), "{steps}": str(steps)}
    answer = muonscale("fit", *(paths.get(word, word) for word in words))
    assert answer.code == 2
    assert said in answer.err and "Traceback" not in answer.err and answer.out == ""


def test_a_report_is_a_page(muonscale: Muonscale, ladder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "report"
    answer = muonscale("fit", "scaling", ladder, "--resamples", "100", "--report", folder)
    assert answer.code == 0, answer.err
    assert str(folder) in answer.out
    assert "FLOPs at equal loss" in (folder / "report.html").read_text(encoding="utf-8")


def test_fit_imports_no_torch(ladder: Path) -> None:
    code = (
        "import sys; sys.argv = ['muonscale', 'fit', 'scaling', sys.argv[1]];"
        "from muonscale.cli import main; code = 0\n"
        "try: main()\n"
        "except SystemExit as stop: code = stop.code\n"
        "assert not code, code\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(ladder)], check=True, capture_output=True)
