"""Exports that are uploaded to the Hub, through the command line; a fake stands for the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from tests.conftest import Muonscale


class FakeHub:
    """Keeps what it is given, or refuses."""

    calls: list[tuple[str, dict[str, Any]]] = []
    refuses = False

    def create_repo(self, name: str, **options: Any) -> str:
        if self.refuses:
            raise PermissionError("403 Forbidden: you may not\nmore lines")
        self.calls.append((name, options))
        return f"https://hub/{name}"

    def upload_folder(self, *, folder_path: Path, **options: Any) -> None:
        self.calls.append((" ".join(sorted(p.name for p in folder_path.iterdir())), options))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[FakeHub]:
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(FakeHub, "calls", [])
    return FakeHub


def test_an_export_is_uploaded_whole(
    muonscale: Muonscale, trained_once: Path, hub: type[FakeHub], tmp_path: Path
) -> None:
    words = ["export", trained_once, tmp_path / "out", "--push", "me/model", "--private"]
    answer = muonscale(*words)
    assert answer.code == 0 and "uploaded to https://hub/me/model" in answer.out, answer.err
    (name, created), (files, uploaded) = hub.calls
    assert (name, created) == ("me/model", {"private": True, "exist_ok": True})
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= {*files.split()}
    assert uploaded["repo_id"] == "me/model" and "Step 12" in uploaded["commit_message"]


def test_a_refused_upload_leaves_the_folder_and_says_how_to_go_on(
    muonscale: Muonscale,
    trained_once: Path,
    hub: type[FakeHub],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hub, "refuses", True)
    answer = muonscale("export", trained_once, tmp_path / "out", "--push", "me/model")
    assert answer.code == 2 and "403 Forbidden: you may not;" in answer.err
    assert f"hf upload me/model {tmp_path / 'out'}" in answer.err
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("why", ["name", "offline", "user", "private"])
def test_what_cannot_be_uploaded_is_refused_before_anything_is_written(
    why: str,
    muonscale: Muonscale,
    trained_once: Path,
    hub: type[FakeHub],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = {"name": ["--push", "model"], "private": ["--private"]}.get(why, ["--push", "me/model"])
    if why == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    if why == "user":
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    answer = muonscale("export", trained_once, tmp_path / "out", *words)
    error = {
        "name": "--push model is no repository",
        "offline": "HF_HUB_OFFLINE is set",
        "user": "hf auth login",
        "private": "without --push NAME",
    }[why]
    assert answer.code == 2 and error in answer.err
    assert not (tmp_path / "out").exists() and not hub.calls
