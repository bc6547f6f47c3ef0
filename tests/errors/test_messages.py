"""Every message of an error names the value that is wrong."""

from __future__ import annotations

from tests.errors.sites import all_sites

OF_NULL = "data.format=chat needs data.tokenizer, which is null"
"""The one message whose value is always null."""


def test_messages_name_the_value() -> None:
    sites = all_sites()
    assert len(sites) > 450
    assert {s.kind for s in sites} >= {"ConfigError", "GroupingError", "LayoutError", "ValueError"}
    lacking = [s for s in sites if s.is_constant]
    assert [s for s in lacking if OF_NULL not in s.message] == []
    assert len(lacking) == 1
