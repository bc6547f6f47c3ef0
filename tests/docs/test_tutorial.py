"""The tutorial's commands, run in its order in an empty folder, as a reader would."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def newcomer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("newcomer")


def test_blocks_are_found_with_their_sections_in_order(newcomer: ModuleType) -> None:
    text = (
        '# T\n## 1. A\n```sh\nls\n```\n```text\nno\n```\n## B\n```yaml title="a.yaml"\nx: 1\n```\n'
    )
    found = [(s.section, s.language, s.text, s.file) for s in newcomer.steps_of(text)]
    assert found == [("1. A", "sh", "ls\n", None), ("B", "yaml", "x: 1\n", "a.yaml")]


@pytest.mark.slow
def test_every_command_of_the_tutorial(newcomer: ModuleType, tmp_path: Path) -> None:
    steps = list(newcomer.steps_of(newcomer.TUTORIAL.read_text(encoding="utf-8")))
    assert len(steps) > 10
    for step in steps:
        newcomer.follow(step, tmp_path, Path(sys.executable))

    def read(path: str) -> dict:
        return json.loads((tmp_path / path).read_text(encoding="utf-8"))

    mine = read("runs/mine/result.json")
    assert mine["validation_loss"] < mine["unigram_loss"] - 0.5
    assert read("runs/mine/eval/result.json")
    assert read("evaluated/result.json")
    assert read("studies/first/result.json")
    for page in ("studies/first/report/report.html", "compared/report.html"):
        assert "<svg" in (tmp_path / page).read_text(encoding="utf-8")
