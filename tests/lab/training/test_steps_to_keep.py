from __future__ import annotations

import pytest

from muonscale.errors import ConfigError
from muonscale.lab.config.load import load_config
from muonscale.lab.training.checkpoint import steps_to_keep


def test_the_configuration_says_which_steps_are_kept() -> None:
    words = ["train.steps=10", "train.batch_tokens=2560", "checkpoint.marks=[0.5, 15361, 0.48]"]
    assert steps_to_keep(load_config("demo", words)) == {5, 7}
    assert steps_to_keep(load_config("demo")) == set()


def test_a_mark_before_the_first_step_is_over_is_that_step() -> None:
    for mark in ("1", "0.0001", "2560"):
        words = ["train.steps=10", "train.batch_tokens=2560", f"checkpoint.marks=[{mark}]"]
        assert steps_to_keep(load_config("demo", words)) == {1}


def test_a_mark_beyond_the_end_is_named() -> None:
    words = ["train.steps=10", "train.batch_tokens=2560", "checkpoint.marks=[0.5, 25601]"]
    with pytest.raises(
        ConfigError, match=r"checkpoint.marks: 25,601 tokens are beyond .* has 25,600"
    ):
        steps_to_keep(load_config("demo", words))


@pytest.mark.parametrize("value", ["[0]", "[-3]", "[half]", "0.5"])
def test_what_is_no_mark_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.marks"):
        load_config("demo", [f"checkpoint.marks={value}"])


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        (["schedule.name=wsd", "schedule.decay=0.3"], {7}),
        (["schedule.name=constant-linear", "schedule.decay=4"], {6}),
        (["schedule.name=wsd", "checkpoint.before_decay=false"], set()),
        (["schedule.name=wsd", "schedule.decay=10", "schedule.warmup=0"], set()),
        (["schedule.name=cosine"], set()),
    ],
)
def test_the_checkpoint_before_the_decay_is_kept(words: list[str], steps: set[int]) -> None:
    assert steps_to_keep(load_config("demo", [*words, "train.steps=10"])) == steps
