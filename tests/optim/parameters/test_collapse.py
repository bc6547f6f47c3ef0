from __future__ import annotations

from itertools import product

import pytest

from muonscale.optim.parameters.collapse import collapse


def expand(name: str) -> set[str]:
    """Return the names that a collapsed one stands for, as a shell would."""
    parts: list[list[str]] = []
    for part in name.split("\0"):
        if not part.startswith("{"):
            parts.append([part])
            continue
        numbers: list[str] = []
        for run in part[1:-1].split(","):
            first, _, last = run.partition("..")
            numbers += map(str, range(int(first), int(last or first) + 1))
        parts.append(numbers)
    return {".".join(choice) for choice in product(*parts)}


def dotted(name: str) -> str:
    """Put a separator where the dots between parts are, not those of a range."""
    return name.replace("..", "\1").replace(".", "\0").replace("\1", "..")


NAMES = {
    "layers": ([f"layers.{i}.up" for i in range(5)], 1),
    "a gap": ([f"layers.{i}.up" for i in (0, 1, 3, 7)], 1),
    "experts": ([f"layers.{i}.experts.{j}.up" for i in range(3) for j in range(4)], 1),
    "other experts": (
        [f"layers.{i}.experts.{j}.up" for i in range(4) for j in range(2 + i % 2)], 2),
    "two kinds": (["0.up", "1.up", "0.down", "1.down", "norm"], 3),
    "no numbers": (["embed", "head.weight"], 2),
}  # fmt: skip


@pytest.mark.parametrize("case", NAMES)
def test_lines_stand_for_every_name_once(case: str) -> None:
    names, lines = NAMES[case]
    collapsed = collapse([(name, ("same",)) for name in names])
    assert len(collapsed) == lines
    found = [expand(dotted(line.name)) for line in collapsed]
    assert sum(map(len, found)) == len(names)
    assert set().union(*found) == set(names)
    assert [line.count for line in collapsed] == list(map(len, found))


def test_rows_that_say_other_things_stay_apart() -> None:
    rows = [(f"layers.{i}.up", ("64x8",) if i else ("32x8",)) for i in range(4)]
    assert [line.name for line in collapse(rows)] == ["layers.0.up", "layers.{1..3}.up"]
    assert [line.name for line in collapse(rows, full=True)] == [name for name, _ in rows]
