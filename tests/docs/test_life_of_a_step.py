"""Names of code in the glossary and in the life of a step exist."""

from __future__ import annotations

import pkgutil
import re

import pytest

from tests.docs.pages import ROOT

OPTIM, LAB = "muonscale.optim.", "muonscale.lab."


def exists(path: str) -> bool:
    try:
        pkgutil.resolve_name(path)
    except (ImportError, AttributeError):
        return False
    return True


@pytest.mark.parametrize("name", ["glossary.md", "concepts/life-of-a-step.md"])
def test_dotted_names_exist(name: str) -> None:
    text = (ROOT / "docs" / name).read_text("utf-8")
    paths = set(re.findall(r"`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+)`", text))
    assert len(paths) > 40
    for path in paths:
        outside = path.startswith(("torch.", "muonscale."))
        assert any(map(exists, [path] if outside else [OPTIM + path, LAB + path])), path
