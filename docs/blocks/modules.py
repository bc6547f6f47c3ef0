"""Every module of the package, with the first paragraph of its docstring and its public names."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import muonscale
from docs.blocks.markdown import table

PACKAGE = Path(muonscale.__file__).parent


def modules() -> str:
    """Return one table for each package: what a module is for, and the names it defines."""
    folders = sorted({path.parent for path in PACKAGE.rglob("*.py")})
    return "\n".join(_table(folder) for folder in folders)


def _table(folder: Path) -> str:
    files = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
    name = ".".join(("muonscale", *folder.relative_to(PACKAGE).parts))
    rows = table(["module", "what it is for", "names"], map(_row, files))
    return f"## {name}\n\n{rows}\n" if files else ""


def _row(file: Path) -> list[str]:
    tree = ast.parse(file.read_text("utf-8"))
    first = (ast.get_docstring(tree) or "").split("\n\n")[0].replace("\n", " ")
    return [f"`{file.stem}`", first, ", ".join(f"`{name}`" for name in _public(tree))]


def _public(tree: ast.Module) -> Iterator[str]:
    """Yield the functions, classes and constants of a module in their order."""
    for node in tree.body:
        names: list[str] = []
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        yield from (name for name in names if not name.startswith("_"))
