"""The README's claims that can be run in seconds are run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.conftest import Muonscale

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


def test_the_optimizer_lines_train_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 20))
    batch = torch.arange(20)

    def loss_of(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch), batch.roll(1))

    before = loss_of(model, batch).item()
    names = {"model": model, "batches": [batch] * 30, "loss_of": loss_of}
    exec(blocks("python")[0], names)
    assert loss_of(model, batch).item() < before - 0.05
    assert "Muon: 1 matrix" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line", [line for block in blocks("sh") for line in block.splitlines() if "muonscale " in line]
)
def test_every_command_is_accepted(line: str, muonscale: Muonscale) -> None:
    words = line.split("#")[0].split()
    words = words[words.index("muonscale") + 1 :]  # what torchrun starts, too
    if words[0] == "train" and "--resume" not in words and not any("data.path" in w for w in words):
        answer = muonscale(*words, *([] if "--dry-run" in words else ["--dry-run"]))
        assert answer.code == 0, answer.err
    elif words[0] != "recipes":
        assert muonscale(words[0], "--help").code == 0


def test_every_linked_file_exists() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
