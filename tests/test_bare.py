"""What `pip install muonscale` gives: the optimizer, with torch alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

DISTRIBUTIONS = """
import re
from importlib.metadata import distributions, requires
installed = {re.sub("[-_.]+", "-", d.metadata["Name"]).lower() for d in distributions()}
needed, todo = set(), ["torch"]
while todo:
    name = todo.pop()
    if name in installed and name not in needed:
        needed.add(name)
        todo += [re.sub("[-_.]+", "-", re.match(r"[\\w.-]+", r)[0]).lower() for r in requires(name) or []]
print(sorted(installed - needed - {"pip", "setuptools", "wheel"}))
"""

STEP = """
import torch
from torch import nn
from muonscale import Muon, parameter_groups, grouping_report
model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 50))
groups = parameter_groups(model, lr=1e-3)
optimizer = Muon(groups)
model(torch.arange(5)).logsumexp(-1).mean().backward()
optimizer.step()
print(grouping_report(groups, model).summary())
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new venv into which the wheel alone was installed."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", folder, ROOT], check=True)
    wheel = next(folder.glob("muonscale-*.whl"))
    subprocess.run([*pip, "install", "-c", ROOT / "constraints.txt", wheel], check=True)
    return python


def ask(python: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [python, *words], cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.mark.slow
def test_the_optimizer_needs_torch_alone(bare: Path, tmp_path: Path) -> None:
    """No other package is imported, since none is there but torch and what torch asks for."""
    assert ask(bare, tmp_path, "-c", DISTRIBUTIONS).stdout == "['muonscale']\n"
    answer = ask(bare, tmp_path, "-W", "error::UserWarning:muonscale", "-c", STEP)
    assert answer.returncode == 0, answer.stderr
    assert "Muon: 1 matrix" in answer.stdout


@pytest.mark.slow
def test_the_command_line_says_what_to_install(bare: Path, tmp_path: Path) -> None:
    answer = ask(bare, tmp_path, "-m", "muonscale", "train")
    assert answer.returncode == 2
    assert 'pip install "muonscale[lab]"' in answer.stderr
    assert "Traceback" not in answer.stderr
