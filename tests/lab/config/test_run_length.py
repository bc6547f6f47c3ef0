"""Steps, sequences and tokens of a run whose batch changes."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from muonscale.lab.config.run_length import Timeline


def test_a_batch_that_grows_counted_by_hand() -> None:
    timeline = Timeline.changing(1000, 2, [(0.2, 4), (600, 8)], length=10)
    # 20 sequences until 0.2: ten steps of 2; 40 more until 600 tokens: ten of 4; 40 left: five of 8
    assert [(p.first_step, p.first_sequence) for p in timeline.phases] == [
        (0, 0),
        (10, 20),
        (20, 60),
    ]
    assert timeline.steps == 25
    assert [timeline.batch_at(step) for step in (0, 9, 10, 19, 20, 24)] == [2, 2, 4, 4, 8, 8]
    assert [timeline.sequences_before(s) for s in (0, 10, 11, 20, 25)] == [0, 20, 24, 60, 100]
    assert timeline.tokens_before(11) == 240
    assert [timeline.step_at(mark) for mark in (0.1, 0.2, 250, 241, 600, 610, 1000)] == [
        5, 10, 12, 12, 20, 21, 25,
    ]  # fmt: skip
    assert timeline.described_batches == "20, from step 10 on 40, from step 20 on 80"


def test_moonlights_published_steps() -> None:
    length = 8192
    timeline = Timeline.changing(5_700 * 10**9, 2048, [(200 * 10**9, 4096)], length)
    # as the paper's checkpoints have it: about 12 thousand steps of 2048, 42 thousand at 1.2T tokens
    assert timeline.phases[1].first_step == pytest.approx(12_000, rel=0.01)
    assert timeline.step_at(1.2e12) == pytest.approx(42_000, rel=0.01)


@example(tokens=32, changes=[(1, 1)])  # the change comes after the last step
@given(
    st.integers(1, 5000), st.lists(st.tuples(st.integers(1, 400), st.integers(1, 9)), max_size=4)
)
def test_batches_add_up(tokens: int, changes: list[tuple[int, int]]) -> None:
    mark, placed = 0, []
    for gap, batch in changes:
        mark += gap + 30  # further than any batch reaches
        if mark < tokens:
            placed.append((float(mark), batch))
    timeline = Timeline.changing(tokens, 3, placed, length=3)
    seen = 0
    for step in range(timeline.steps):
        assert timeline.sequences_before(step) == seen
        seen += timeline.batch_at(step)
        wanted = next((b for m, b in reversed(placed) if timeline.tokens_before(step) >= m), 3)
        assert timeline.batch_at(step) == wanted
    assert timeline.sequences_before(timeline.steps) == seen
    last = timeline.batch_at(timeline.steps - 1) * 3
    assert tokens <= seen * 3 < tokens + last
    for mark in (1, tokens / 3, tokens - 1):
        step = timeline.step_at(max(1, mark))
        assert timeline.tokens_before(step) >= math.ceil(max(1, mark)) or step == timeline.steps
        assert step == 0 or timeline.tokens_before(step - 1) < math.ceil(max(1, mark))


@pytest.mark.parametrize(
    ("mark", "step"),
    [(0.01, 1), (0.1, 1), (0.11, 2), (0.5, 5), (0.999, 10), (1, 1), (10, 1), (10.5, 2), (100, 10)],
)
def test_a_mark_is_the_first_step_that_begins_at_or_after_it(mark: float, step: int) -> None:
    assert Timeline.constant(10, length=10).step_at(mark) == step


def test_a_fraction_is_the_decimal_that_was_written() -> None:
    assert 0.07 * 100 > 7  # so that the float's value would be one step late
    for hundredth in range(1, 100):
        assert Timeline.constant(100).step_at(hundredth / 100) == hundredth


@pytest.mark.parametrize("changes", [[(0.5, 2), (0.4, 4)], [(1000, 2)]])
def test_changes_out_of_place_are_refused(changes: list[tuple[float, int]]) -> None:
    with pytest.raises(ValueError, match="is not after"):
        Timeline.changing(1000, 1, changes, length=10)
