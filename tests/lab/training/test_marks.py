from __future__ import annotations

import pytest

from muonscale.errors import ConfigError
from muonscale.lab.config import load_config
from muonscale.lab.training.marks import kept_steps, marked_steps


def tens(step: int) -> int:
    return 10 * step


@pytest.mark.parametrize(
    ("mark", "step"),
    [
        (0.01, 1), (0.1, 1), (0.11, 2), (0.5, 5), (0.999, 10),
        (1, 1), (10, 1), (10.5, 2), (11, 2), (20, 2), (100, 10),
    ],
)  # fmt: skip
def test_a_mark_is_the_first_step_at_or_after_it(mark: float, step: int) -> None:
    assert marked_steps([mark], 10, tens) == {step}


def test_a_fraction_is_the_decimal_that_was_written() -> None:
    assert 0.07 * 100 > 7  # so that the float's value would be one step late
    for hundredth in range(1, 100):
        assert marked_steps([hundredth / 100], 100, lambda step: step) == {hundredth}


def test_marks_follow_tokens_where_the_batch_grows() -> None:
    def tokens(step: int) -> int:  # two steps of 10, then steps of 30
        return 10 * min(step, 2) + 30 * max(step - 2, 0)

    assert marked_steps([0.5, 20, 21, 110], 5, tokens) == {2, 3, 4, 5}
    assert marked_steps([0.5], 5, tokens) == {4}


def test_marks_may_meet_and_may_be_absent() -> None:
    assert marked_steps([0.41, 45, 50], 10, tens) == {5}
    assert marked_steps([], 10, tens) == set()


def test_a_mark_beyond_the_end_is_named() -> None:
    with pytest.raises(ConfigError, match=r"checkpoint.marks: 101 tokens are beyond .* has 100"):
        marked_steps([0.5, 101], 10, tens)


def test_the_configuration_says_which_steps_are_kept() -> None:
    words = ["train.steps=10", "train.batch_tokens=2560", "checkpoint.marks=[0.5, 15361]"]
    assert kept_steps(load_config("demo", words)) == {5, 7}


@pytest.mark.parametrize("value", ["[0]", "[-3]", "[half]", "0.5"])
def test_what_is_no_mark_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.marks"):
        load_config("demo", [f"checkpoint.marks={value}"])
