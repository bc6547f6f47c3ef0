"""Links of all pages exist, their commands are accepted, and the lines of migration run."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.peers import torch_muon_in_float32
from muonscale import Muon
from muonscale.lab.config.load import Config, recipe_names
from muonscale.lab.models.presets import PRESETS
from muonscale.optim.migrate.aliases import FOREIGN
from muonscale.optim.newton_schulz import orthogonalize
from tests.conftest import Muonscale
from tests.docs.pages import PAGES, ROOT, anchors, commands, fences, links, words_of

ANSWER_AT_ONCE = {"inspect", "lr", "plan", "recipes"}
"""Verbs that are run as they stand; `train` gets --dry-run, of others the options are looked up."""
COMMANDS = [
    pytest.param(page, line, id=f"{page.relative_to(ROOT)}: {line.split('#')[0].strip()}")
    for page in PAGES
    for line in dict.fromkeys(commands(page))
]
HOW_TO = ROOT / "docs" / "how-to"
MIGRATION = ROOT / "docs" / "migration.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_linked_files_and_headings_exist(page: Path) -> None:
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), link


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_commands_are_accepted(page: Path, line: str, muonscale: Muonscale) -> None:
    words = words_of(line)
    verb = words[: 2 if words[0] in ("study", "fit") else 1]
    if words[0] == "train" and can_run(words[1:]) and "--resume" not in words:
        answer = muonscale(*words, *([] if "--dry-run" in words else ["--dry-run"]))
    elif words[0] in ANSWER_AT_ONCE and can_run(words[1:]):
        answer = muonscale(*words)
    else:
        answer = muonscale(*verb, "--help")
        check_options(words[len(verb) :], answer.out)
    assert answer.code == 0, answer.err


def can_run(words: list[str]) -> bool:
    """Return whether a command names no file, nor a model that is not the package's own."""
    shipped = {*recipe_names(), *PRESETS}
    first = words[0] if words and not words[0].startswith("--") and "=" not in words[0] else "demo"
    read = [word for word in words if re.match(r"(data\.path|model\.(config|weights))=", word)]
    return not read and first in shipped and "--figure" not in words


def check_options(words: list[str], known: str) -> None:
    """See that options and keys of a command that is not run are there."""
    sections = set(Config.model_fields) | {"schedule", "study"}
    for word in words:
        if word.startswith("--"):
            assert word.split("=")[0] in known, word
        elif "=" in word and "." in word.split("=")[0]:
            assert word.split(".")[0] in sections, word


def test_pages_are_found_and_have_commands_and_links() -> None:
    assert len(PAGES) > 15 and len(COMMANDS) > 30
    assert sum(len(links(page)) for page in PAGES) > 60


RUN = ["index.md", "models.md", "transfer.md", *sorted(p.name for p in HOW_TO.glob("*.md"))]


@pytest.mark.parametrize("name", RUN)
def test_python_of_a_page_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    page = next(page for page in (ROOT / "docs" / name, HOW_TO / name) if page.exists())
    for fence in fences(page, "python"):
        exec(fence.text, {"model": model()})


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "embed": nn.Embedding(20, 12),
            "up": nn.Linear(12, 30),
            "down": nn.Linear(30, 12),
            "head": nn.Linear(12, 20, bias=False),
        }
    )


def stepped(names: dict[str, Any], optimizers: list[str]) -> list[torch.Tensor]:
    """Return the parameters after three steps on fixed gradients."""
    generator = torch.Generator().manual_seed(1)
    parameters = list(names["model"].parameters())
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for name in optimizers:
            names[name].step()
    return parameters


@pytest.mark.parametrize(
    ("first", "old"), [(1, ["muon", "adamw"]), (3, ["optimizer"])], ids=["Muon", "AdamW"]
)
def test_before_and_after_of_torch_give_the_same_steps(
    first: int, old: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orthogonalize, "_fast_bf16", lambda device_type, index: False)
    before, after = fences(MIGRATION, "python")[first : first + 2]
    names: dict[str, Any] = {"torch": torch, "model": model()}
    exec(before.text, names)
    with torch_muon_in_float32():
        expected = stepped(names, old)
    names = {"model": model()}
    exec(after.text, names)
    for left, right in zip(expected, stepped(names, ["optimizer"]), strict=True):
        torch.testing.assert_close(right.detach(), left.detach(), rtol=1e-4, atol=1e-5)


def test_every_other_line_of_migration_runs() -> None:
    listed = [fence for fence in fences(MIGRATION, "python") if "translate_arguments" in fence.text]
    for fence in listed:
        names: dict[str, Any] = {"model": copy.deepcopy(model())}
        exec(fence.text, names)
        assert isinstance(names["optimizer"], Muon)
        stepped(names, ["optimizer"])
    text = MIGRATION.read_text("utf-8")
    assert len(listed) == 11
    for source in FOREIGN:
        assert f"<!-- begin: migration: {source}, by" in text


def test_pictures_are_small_and_ask_no_other_server() -> None:
    pictures = [p for p in (ROOT / "docs" / "images").rglob("*") if p.suffix in (".png", ".svg")]
    assert len(pictures) > 8
    for picture in pictures:
        assert picture.stat().st_size < 150_000, picture
        if picture.suffix == ".svg":
            hosts = re.findall(r"https?://([^/\"' ]+)", picture.read_text("utf-8"))
            assert set(hosts) <= {"www.w3.org"}, picture
