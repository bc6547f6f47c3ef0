from __future__ import annotations

import io
from pathlib import Path

import pytest

from tests.conftest import Muonscale

FEW = ["--tokens", 5, "--temperature", 0]


def test_a_step_of_a_run_and_its_last_one(muonscale: Muonscale, finished: Path) -> None:
    final = muonscale("generate", finished, "import", *FEW)
    last = muonscale("generate", f"{finished}@12", "import", *FEW)
    assert final.code == last.code == 0, last.err
    assert final.out == last.out and final.out.startswith("import")
    answer = muonscale("generate", f"{finished}@7", "import", *FEW)
    assert answer.code == 2 and "step 7" in answer.err
    answer = muonscale("generate", f"{finished / 'model'}@7", "import", *FEW)
    assert answer.code == 2 and "@7" in answer.err


def test_the_prompt_may_come_from_standard_input(
    muonscale: Muonscale, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = muonscale("generate", finished, "import os\n", *FEW).out
    monkeypatch.setattr("sys.stdin", io.StringIO("import os\n"))
    assert muonscale("generate", finished, "-", *FEW).out == given


def test_a_message_is_answered_by_the_chat_template(muonscale: Muonscale, finished: Path) -> None:
    answer = muonscale("generate", finished, "import", "--chat", *FEW)
    assert answer.code == 2 and "chat template" in answer.err
    template = "{{ messages[0].content }}{% if add_generation_prompt %}\ndef{% endif %}"
    (finished / "model" / "chat_template.jinja").write_text(template)
    answer = muonscale("generate", finished, "import", "--chat", *FEW)
    whole = muonscale("generate", finished, "import\ndef", *FEW)
    assert answer.code == 0, answer.err
    assert answer.out == whole.out.removeprefix("import\ndef")


def test_a_folder_that_does_not_exist_is_refused_before_torch_is_imported(
    muonscale: Muonscale, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("muonscale.lab.models.convert", "muonscale.lab.evaluation.command"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    for words in (["generate", "none"], ["eval", "none"], ["export", "none", "folder"]):
        answer = muonscale(*words)
        assert answer.code == 2 and "none" in answer.err and "does not exist" in answer.err
