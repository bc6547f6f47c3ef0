"""The docstring of every larger package of the lab names its modules."""

from __future__ import annotations

import ast
import re

import pytest

from tests.docs.pages import ROOT

LAB = ROOT / "src" / "muonscale" / "lab"
PACKAGES = [
    "bench", "config", "coordcheck", "data", "estimate", "evaluation", "fits", "models", "parallel",
    "report", "studies", "training", "verify",
]  # fmt: skip


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_of_a_package_is_named(package: str) -> None:
    folder = LAB / package
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text("utf-8"))) or ""
    named = {part for name in re.findall(r"`([\w.]+)`", text) for part in name.split(".")}
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert modules and modules <= named, sorted(modules - named)
