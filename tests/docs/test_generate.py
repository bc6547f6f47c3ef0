"""What follows from the code is written in the pages as the code has it now."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from docs.generate import BLOCKS, MARKED, pages, renew
from tests.docs.pages import ROOT

SLOW = {"parameter-groups.md"}  # builds thirty models on the meta device


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.name, marks=[pytest.mark.slow] if page.name in SLOW else [])
        for page in pages()
    ],
)
def test_blocks_are_up_to_date(page: Path) -> None:
    text = page.read_text("utf-8")
    assert renew(text) == text, f"{page.name} is out of date: python -m docs.generate"


def test_every_block_is_on_a_page_and_nothing_else_is_touched() -> None:
    found = [
        match[2].partition(": ")[0]
        for page in pages()
        for match in MARKED.finditer(page.read_text("utf-8"))
    ]
    assert set(found) == set(BLOCKS)
    old = "before\n<!-- begin: no counterpart, by docs/generate.py -->\nold\n<!-- end -->\nafter\n"
    new = renew(old)
    assert new.startswith("before\n<!-- begin") and new.endswith("<!-- end -->\nafter\n")
    assert "AdaMuon" in new and "old" not in new


def test_every_public_name_is_in_the_reference() -> None:
    import muonscale

    api = (ROOT / "docs" / "reference" / "api.md").read_text("utf-8")
    assert sorted(re.findall(r"^::: muonscale\.(\w+)$", api, flags=re.M)) == sorted(
        [*muonscale.__all__, "errors"]
    )


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    mkdocs = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path)]
    answer = subprocess.run(mkdocs, cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    for page in ("index.html", "reference/parameter-groups/index.html", "migration/index.html"):
        assert (tmp_path / page).is_file()
    assert not list(tmp_path.rglob("*.py"))
    api = (tmp_path / "reference" / "api" / "index.html").read_text("utf-8")
    assert 'id="muonscale.translate_arguments"' in api
    for page in (tmp_path / "reference").rglob("index.html"):
        text = page.read_text("utf-8")
        assert "<blockquote" not in text, page  # ">>>" outside a code block
        # An asterisk of a formula or of a pattern that began or ended an emphasis.
        assert not re.search(r"[\w/.]<em>|</em>\w", text), page


def test_examples_are_code() -> None:
    """A section that griffe does not know is a block of prose, where `>>>` is a nested quote."""
    griffe = pytest.importorskip("griffe")
    package = griffe.load("muonscale", search_paths=[ROOT / "src"])
    count = 0

    def check(item: Any) -> None:
        nonlocal count
        for section in item.docstring.parse("google", warnings=False) if item.docstring else ():
            if section.kind.value == "examples":
                count += 1
            elif ">>>" in str(section.as_dict()):
                raise AssertionError(f"{item.path}: an example under {section.kind.value!r}")
        for member in item.members.values():
            if not member.is_alias:
                check(member)

    check(package)
    assert count > 20
