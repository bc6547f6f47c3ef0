"""The options of every rule, from `muonscale.optim.options`."""

from __future__ import annotations

from dataclasses import fields

from docs.blocks.markdown import code, table
from muonscale.lab.config.keys import read_docstrings
from muonscale.optim import options
from muonscale.optim.rules.base import RULES


def rule_options() -> str:
    """Return a table of the common options, and one for each rule."""
    lines = ["## Every rule", _table(options.CommonOptions), _table(options.NarrowOptions)]
    for rule in sorted(RULES.values(), key=lambda rule: not rule.on_matrices):
        lines += [f"## {rule.title}", f'`rule="{rule.name}"`', _table(rule.options)]
    lines += ["## Parameter groups", _table(options.GroupingOptions)]
    return "\n\n".join(lines)


def _table(cls: type) -> str:
    meanings = {name: meaning for name, (_, meaning) in read_docstrings(cls).items()}
    if missing := [f.name for f in fields(cls) if not meanings[f.name]]:
        raise LookupError(f"{missing[0]} of {cls.__name__} has no docstring under it")
    rows = [[code(f.name), code(repr(f.default)), meanings[f.name]] for f in fields(cls)]
    return f"{cls.__doc__}\n\n" + table(["option", "default", "what it does"], rows)
