"""`track` by itself, and ranges of steps, on the command line and in YAML."""

from __future__ import annotations

from pathlib import Path

import pytest

from muonscale.errors import ConfigError
from muonscale.lab.config.load import load_config
from muonscale.lab.config.read import read_yaml
from muonscale.lab.studies.planned_run import PlannedRun


@pytest.mark.parametrize(
    ("words", "to"),
    [
        (["track=wandb"], ["wandb"]),
        (["track=[tensorboard,wandb,wandb]"], ["tensorboard", "wandb"]),
        (["track=wandb", "track=none"], []),
        (["track.to=trackio", "track.project=mine"], ["trackio"]),
        (["track=null"], []),
    ],
)
def test_trackers_on_the_command_line(words: list[str], to: list[str]) -> None:
    assert load_config("demo", words).track.to == to


def test_trackers_in_yaml(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    text = "run: {path: r}\nmodel: {preset: llama-pico}\ndata: {source: python-stdlib}\n"
    recipe.write_text(text + "train: {steps: 20}\ntrack: wandb\nprofile: {steps: 10:15}\n")
    config = load_config(str(recipe), ["track.mode=offline"])
    assert (config.track.to, config.track.mode) == (["wandb"], "offline")
    assert list(config.profile.step_range) == [10, 11, 12, 13, 14]


def test_numbers_with_a_colon_are_text_and_others_stay_numbers() -> None:
    assert read_yaml("[10:15, 1:60, 10, 1e-6, 0.5]") == ["10:15", "1:60", 10, 1e-6, 0.5]


@pytest.mark.parametrize("steps", ["10", "0:3", "5:5", "7:3", "19:22", "1:2:3", "a:b"])
def test_steps_that_are_no_range_of_the_run(steps: str) -> None:
    with pytest.raises(ConfigError, match=r"profile\.steps"):
        load_config("demo", ["train.steps=20", f"profile.steps={steps}"])


def test_the_last_step_can_be_profiled() -> None:
    config = load_config("demo", ["train.steps=20", "profile.steps=20:21"])
    assert list(config.profile.step_range) == [20]


def test_neither_changes_the_identity_of_a_run() -> None:
    plain, followed = (
        PlannedRun({}, load_config("demo", ["train.steps=20", *words]))
        for words in ([], ["track=wandb", "profile.steps=1:3"])
    )
    assert plain.id == followed.id
