from __future__ import annotations

import io
import itertools
import re
from typing import Any

import pytest
from rich.console import Console

from muonscale.lab.training import console as console_module
from muonscale.lab.training.console import RunConsole


def record(step: int, seconds: float = 0.5, tokens: int = 1000) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 3.25,
        "lr": {"hidden": 0.02},
        "grad_norm": {"hidden": 3.0, "rest": 4.0},
        "step_ms": 1000 * seconds,
        "tokens_per_second": tokens / seconds,
    }


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(console_module.time, "monotonic", lambda: now[0])
    return now


def lines(file: io.StringIO) -> list[str]:
    return file.getvalue().splitlines()


def plain(file: io.StringIO) -> RunConsole:
    return RunConsole(Console(file=file, soft_wrap=True, width=80))


def test_a_line_has_what_a_reader_looks_for(clock: list[float]) -> None:
    file = io.StringIO()
    console = plain(file)
    with console.steps(0, 8641) as show:
        show(record(1), ("1.2GB", "epoch 0.01"))
        console.validation({"step": 1, "validation_loss": 3.5}, 8641)
        clock[0] = 31.0
        show(record(2, seconds=1.5), ())
    first, measured, second = lines(file)
    assert first == (
        "step 1/8641  loss 3.250  grad 5  lr 2.0e-02  2k tok/s  1.2GB  epoch 0.01  left 1 h 12 min"
    )
    assert measured == "step 1/8641  validation loss 3.500"
    # 2,000 tokens in 2 seconds, and 8,639 steps of one second
    assert "loss 3.250  val 3.500  grad" in second
    assert "1k tok/s" in second and second.endswith("left 2 h 24 min")


@pytest.mark.parametrize(
    ("every", "seconds", "steps"),
    [
        (None, 0.1, [1, *range(50, 1001, 50)]),
        (10, 0.1, [1, *range(10, 1001, 10)]),
        (500, 10, [1, *range(4, 500, 3), *range(500, 1000, 3), 1000]),
        (None, 40, list(range(1, 1001))),
    ],
)
def test_a_log_is_never_silent(
    every: int | None, seconds: float, steps: list[int], clock: list[float]
) -> None:
    file = io.StringIO()
    with plain(file).steps(0, 1000, every=every) as show:
        for step in range(1, 1001):
            clock[0] += seconds
            show(record(step), ())
    printed = [int(n) for n in re.findall(r"^step (\d+)/", file.getvalue(), flags=re.M)]
    if every == 500:  # at 30 seconds or more after the last line
        assert max(b - a for a, b in itertools.pairwise(printed)) == 3
        assert {1, 500, 1000} <= set(printed)
    else:
        assert printed == steps


def test_a_terminal_of_80_columns_shows_everything_whole() -> None:
    file = io.StringIO()
    console = RunConsole(Console(file=file, width=80, force_terminal=True, color_system=None))
    with console.steps(0, 100_000) as show:
        console.validation({"step": 0, "validation_loss": 10.123}, 100_000)
        show(record(12_345, seconds=0.1, tokens=123_456), ("121GB", "epoch 12.31"))
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue()).splitlines()
    assert max(map(len, shown)) <= 80
    bar, status = next((a, b) for a, b in itertools.pairwise(shown) if "12345/" in a)
    assert "12345/100000" in bar and bar.rstrip().endswith("left 2 h 26 min")
    assert status.strip() == (
        "loss 3.250  val 10.123  grad 5  lr 2.0e-02  1.23M tok/s  121GB  epoch 12.31"
    )


def test_stages_that_take_long_say_how_far_they_are(clock: list[float]) -> None:
    file = io.StringIO()
    with plain(file).stages() as report:
        for done in range(0, 101, 5):
            report("tokenizing", done, 100)
            clock[0] += 10.0
    assert lines(file)[0] == "data: tokenizing"
    assert lines(file)[1] == "data: tokenizing: 15 %  left 2 min 50 s"
    assert len(lines(file)) == 7
