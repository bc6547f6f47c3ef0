from __future__ import annotations

from muonscale.lab.training.profiler_memory import MemoryChange, _innermost, bytes_alive


def test_an_allocation_belongs_to_the_innermost_span_that_holds_it() -> None:
    spans = [(0, 100, "outer"), (10, 30, "inner"), (40, 50, "other")]
    at = {5: "outer", 10: "inner", 30: "inner", 35: "outer", 45: "other", 60: "outer"}
    at[101] = "outside"
    changes = [MemoryChange(ns, 1, 1) for ns in at]
    assert [name for _, name in _innermost(changes, spans)] == list(at.values())


def test_what_is_alive_adds_up() -> None:
    assert bytes_alive([MemoryChange(0, 8, 1), MemoryChange(1, 4, 1), MemoryChange(2, -8, 1)]) == [
        8,
        12,
        4,
    ]
