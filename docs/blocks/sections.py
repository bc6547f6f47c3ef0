"""Sections of the configuration: the key, type, default and docstring of each field."""

from __future__ import annotations

import itertools

from docs.blocks.markdown import code, table
from muonscale.lab.config.keys import Key, keys_of, section_text
from muonscale.lab.config.load import Config


def sections() -> str:
    """Return every section as a table, and the items of its lists each as one more."""
    lines = []
    for name in Config.model_fields:
        lines += [f"## `{name}`", section_text(name)]
        keys = sorted(keys_of(name), key=lambda key: key.name.count(".N."))
        for part, rows in itertools.groupby(keys, lambda key: key.name.rpartition(".N.")[0]):
            lines += [f"An item of `{part}`:"] if part else []
            lines.append(table(["key", "type", "default", "what it is"], map(_row, rows)))
    return "\n\n".join(lines)


def _row(key: Key) -> list[str]:
    default = key.default if key.default in ("-", "required") else code(key.default)
    name = key.name.rpartition(".N.")[2]
    return [f"`{name}`", ", ".join(map(code, key.types)), default, key.meaning]
