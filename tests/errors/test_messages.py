"""Every message of an error names the value that is wrong."""

from __future__ import annotations

import pytest

from tests.errors.sites import all_sites

NULL = {"lab/sections.py:_chats: data.format=chat needs data.tokenizer, w"}
"""The one site where the value is null."""

SITES = all_sites()


def test_the_scan_finds_the_sites() -> None:
    assert len(SITES) > 450
    assert {s.kind for s in SITES} >= {"ConfigError", "RoutingError", "LayoutError", "ValueError"}


@pytest.mark.parametrize("module", sorted({site.module for site in SITES}))
def test_messages_name_the_value(module: str) -> None:
    lacking = {site.key for site in SITES if site.module == module and "{" not in site.text}
    assert lacking <= NULL
