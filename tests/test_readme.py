"""The README's lines of Python are run; its commands and links: tests/docs/test_pages.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.docs.pages import ROOT, fences


def test_the_optimizer_lines_train_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 20))
    batch = torch.arange(20)

    def loss_of(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch), batch.roll(1))

    before = loss_of(model, batch).item()
    names = {"model": model, "batches": [batch] * 30, "loss_of": loss_of}
    exec(fences(ROOT / "README.md", "python")[0].text, names)
    assert loss_of(model, batch).item() < before - 0.05
    assert "Muon: 1 matrix" in capsys.readouterr().out
