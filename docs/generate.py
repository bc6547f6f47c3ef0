"""Write the parts of the pages that follow from the code: `python -m docs.generate`.

A page has marked blocks, from `<!-- begin: NAME, by docs/generate.py -->` to `<!-- end -->`. Their
content is replaced; the rest of the page does not change. A name with a colon, as in
`migration: torch`, passes an argument to the block. With `--check` nothing is written, and the names of
outdated pages are printed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from docs.blocks import cli, layouts, migration, modules, options, parameter_groups, sections

DOCS = Path(__file__).parent
MARKED = re.compile(
    r"(<!-- begin: ([^,\n]+), by docs/generate\.py -->\n).*?(<!-- end -->)", flags=re.S
)

BLOCKS: dict[str, Callable[..., str]] = {
    "roles": parameter_groups.roles,
    "routing of": parameter_groups.architecture,
    "fused": parameter_groups.fused_parameters,
    "known matrices": parameter_groups.known_matrices,
    "elementwise": parameter_groups.known_uses,
    "layouts of the optimizer": layouts.optimizer,
    "parameters of the layout tests": layouts.parameters,
    "layouts of the trainer": layouts.trainer,
    "variants of the trainer": layouts.variants,
    "refused layouts": layouts.refused_layouts,
    "migration": migration.arguments,
    "no counterpart": migration.no_counterpart,
    "command line": cli.commands,
    "sections": sections.sections,
    "options of rules": options.rule_options,
    "modules": modules.modules,
}


def pages() -> list[Path]:
    """Return the pages that have a block."""
    return [page for page in sorted(DOCS.rglob("*.md")) if MARKED.search(page.read_text("utf-8"))]


def renew(text: str) -> str:
    """Return a page with new blocks."""

    def replace(match: re.Match[str]) -> str:
        name, _, argument = match[2].partition(": ")
        content = BLOCKS[name](argument) if argument else BLOCKS[name]()
        return f"{match[1]}\n{content.strip()}\n\n{match[3]}"

    return MARKED.sub(replace, text)


def main() -> int:
    """Write or check the pages."""
    check, stale = "--check" in sys.argv, False
    for page in pages():
        text = page.read_text("utf-8")
        new = renew(text)
        if new != text:
            stale = True
            print(page.relative_to(DOCS.parent))
            if not check:
                page.write_text(new, encoding="utf-8")
    return int(check and stale)


if __name__ == "__main__":
    sys.exit(main())
