from __future__ import annotations

from collections.abc import Callable

import pytest

from muonscale.errors import ConfigError, StudyError
from muonscale.lab.config.load import load_config
from muonscale.lab.studies.planned_run import PlannedRun, index_runs
from muonscale.lab.studies.study import Study


def planned(*overrides: str, name: str = "a") -> PlannedRun:
    return PlannedRun({"variant": name, "lr": 0.01}, load_config("demo", overrides))


@pytest.mark.parametrize(
    "free",
    [
        *(
            "run.path=x",
            "run.threads=3",
            "run.device=cpu",
            "data.cache=/tmp/x",
            "checkpoint.every=7",
        ),
        *("parallel.data=ddp", "train.micro_batch_tokens=1024", "train.compile=true"),
        "optimizer.momentum=0.95",  # the default, said
    ],
)
def test_where_and_how_a_run_is_done_is_not_part_of_its_id(free: str) -> None:
    assert planned(free).id == planned().id


@pytest.mark.parametrize(
    "changed",
    [
        "run.seed=1",
        "optimizer.lr=0.3",
        "train.batch_tokens=2048",
        "eval.every=3",
        "data.vocab_size=999",
    ],
)
def test_what_changes_the_outcome_changes_the_id(changed: str) -> None:
    assert planned(changed).id != planned().id


def test_a_folder_can_be_read_and_ends_with_the_id() -> None:
    run = planned(name="muon plus/row")
    assert run.label == "muon plus/row lr=0.01"
    assert run.folder == f"muon-plus-row-lr-0.01-{run.id}"


def test_one_configuration_under_two_names_is_refused() -> None:
    with pytest.raises(StudyError, match="same configuration"):
        index_runs([planned(name="a"), planned(name="b")])
    assert len(index_runs([planned(), planned()])) == 1


def test_the_study_sets_seed_path_and_threads(compare: Callable[..., Study]) -> None:
    study = compare(set={"run.seed": 3})
    with pytest.raises(ConfigError, match=r"set\.run\.seed"):
        study.plan({})


def test_a_wrong_key_names_the_run(compare: Callable[..., Study]) -> None:
    study = compare(set={"train.batch": 3})
    with pytest.raises(ConfigError, match=r"adamw lr=0.02 seed=0.*train\.batch"):
        study.plan({})
