"""Tables of other optimizers' arguments, from `muonscale.optim.migrate.aliases`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from docs.blocks.markdown import code, table, wrap
from muonscale.optim.migrate.aliases import FOREIGN, NO_COUNTERPART
from muonscale.optim.migrate.aliases.argument import Argument


def arguments(source: str) -> str:
    """Return the table of one class."""
    foreign = FOREIGN[source]
    rows = [
        [code(name), code(repr(row.default)), _ours(row), _note(row)]
        for name, row in foreign.arguments.items()
    ]
    lines = [wrap(f"{foreign.what}. Read from {foreign.source}."), ""]
    lines += [table(["argument", "default", "here", ""], rows)]
    if foreign.fixed:
        lines += ["", wrap(f"Always: {_options(foreign.fixed)}.")]
    if foreign.note:
        lines += ["", wrap(foreign.note)]
    return "\n".join(lines)


def _ours(row: Argument) -> str:
    if row.ours:
        return code(row.ours) + (" of the groups on AdamW" if row.adamw else "")
    if row.note.startswith("`parameter_groups("):
        return "`parameter_groups`"
    return "not needed" if row.only is None else "no counterpart"


def _note(row: Argument) -> str:
    parts = [
        f"{code(repr(value))}: {_options(options)}"
        for value, options in (row.choices or {}).items()
        if options
    ]
    if not row.ours and row.only:
        parts.append(f"only {code(repr(row.only[0]))}")
    return "; ".join([*parts, *([row.note] if row.note else [])])


def _options(options: Mapping[str, Any]) -> str:
    return ", ".join(code(f"{name}={_value(value)}") for name, value in options.items())


def _value(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def no_counterpart() -> str:
    """Return a table of the classes that cannot be translated, with the reasons."""
    rows = [[missing.what, missing.why] for missing in NO_COUNTERPART.values()]
    return table(["class", "why"], rows)
