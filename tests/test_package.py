"""The built wheel, installed apart from the source; names of classes."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_wheel_carries_its_data_and_runs(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", tmp_path, ROOT], check=True)
    wheel = next(tmp_path.glob("muonscale-*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("muonscale/recipes/demo.yaml", "muonscale/py.typed"):
        assert name in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    target = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", target, wheel], check=True)
    answer = subprocess.run(
        [sys.executable, "-m", "muonscale", "train", "--dry-run"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr
    where = subprocess.run(
        [sys.executable, "-c", "import muonscale; print(muonscale.__file__)"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
    )
    assert str(target) in where.stdout


def test_a_class_name_is_used_once() -> None:
    places: dict[str, list[str]] = {}
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(path.relative_to(ROOT).as_posix())
    assert {name: where for name, where in places.items() if len(where) > 1} == {}
