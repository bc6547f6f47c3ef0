"""The docstrings of attributes, which Python itself does not keep."""

from __future__ import annotations

import ast
import inspect
import textwrap


def read_docstrings(cls: type) -> dict[str, tuple[str, str]]:
    """Return (annotation, docstring) of each attribute in the body of a class, by name.

    Both are on one line, and empty if the source has none.
    """
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(body, ast.ClassDef)
    found: dict[str, tuple[str, str]] = {}
    for node, after in zip(body.body, [*body.body[1:], None], strict=True):
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        annotation = ast.unparse(node.annotation) if isinstance(node, ast.AnnAssign) else ""
        text = ast.literal_eval(after.value) if isinstance(after, ast.Expr) else ""
        found[ast.unparse(target)] = annotation, " ".join(text.split())
    return found
