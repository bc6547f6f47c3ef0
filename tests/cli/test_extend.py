"""Finished runs that are made longer, through the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from muonscale.lab.training.extend import plan_extension
from tests.cli.jobs import checkpoints, losses, records, weights
from tests.conftest import Muonscale, tiny_words, train_shared

WSD = ["schedule.name=wsd", "schedule.warmup=2", "schedule.decay=0.25", "train.steps=12"]


@pytest.fixture(scope="module")
def wsd_once(corpus_file: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 12 steps whose decay begins at step 9; only to be read."""
    folder = tmp_path_factory.mktemp("wsd") / "run"
    train_shared(*tiny_words(folder, corpus_file, cache), *WSD, "checkpoint.keep=1")
    return folder


def test_a_longer_wsd_run_has_the_weights_of_one_planned_so(
    muonscale: Muonscale, tiny: list[str], wsd_once: Path, tmp_path: Path
) -> None:
    assert checkpoints(wsd_once) == [9, 12]  # that before the decay was kept
    before = {p: p.stat().st_mtime_ns for p in wsd_once.rglob("*") if p.is_file()}
    longer, planned = tmp_path / "longer", tmp_path / "run"
    words = ["train", wsd_once, "--extend", "train.steps=20", f"run.path={longer}"]
    plan = muonscale(*words, "--dry-run")
    assert plan.code == 0 and f"goes on from step 9 of {wsd_once}" in plan.out, plan.err
    answer = muonscale(*words)
    assert answer.code == 0, answer.err
    assert "at step 9 of 20" in answer.out and "warning" not in answer.out
    assert muonscale("train", *tiny, *WSD, "train.steps=20").code == 0
    assert weights(longer) == weights(planned)
    assert losses(longer) == losses(planned) and len(losses(longer)) == 20
    assert [r["lr"] for r in records(longer, "train")] == [
        r["lr"] for r in records(planned, "train")
    ]
    env = json.loads((longer / "env.json").read_text())
    assert env["extended"] == {"run": str(wsd_once), "step": 9}
    assert {p: p.stat().st_mtime_ns for p in before} == before

    # It is a run like any other: resumed, and made longer again.
    assert "is finished" in muonscale("train", longer, "--resume").out
    answer = muonscale("train", *words[1:])
    assert answer.code == 2 and "already exists" in answer.err
    again = plan_extension(longer, None, ["train.steps=30", f"run.path={tmp_path / 'third'}"])
    assert again.choose_step(pytest.fail) == 15


def test_a_cosine_run_is_made_longer_only_from_a_named_step(
    muonscale: Muonscale, finished: Path, tmp_path: Path
) -> None:
    longer = tmp_path / "longer"
    words = ["--extend", "train.steps=24", f"run.path={longer}"]
    answer = muonscale("train", finished, *words)
    assert answer.code == 2
    for part in ("after step 1,", "of steps 12, 10", "from 0.115 to 0.55", f"{finished}@12"):
        assert part in answer.err
    assert not longer.exists()
    answer = muonscale("train", f"{finished}@12", *words)
    assert answer.code == 0, answer.err
    assert "warning" in answer.out and "steps 2 to 12 are those of the shorter run" in answer.out
    assert losses(longer)[:12] == losses(finished) and len(losses(longer)) == 24


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["train.steps=12"], "has 12 steps, and 12 are not more"),
        (["train.steps=24", "optimizer.lr=0.1"], "optimizer.lr is 0.02 in the run, and 0.1 now"),
        (["train.steps=24", "run.path={run}"], "give run.path=FOLDER"),
    ],
)
def test_what_is_no_longer_run_is_refused(
    words: list[str], error: str, muonscale: Muonscale, trained_once: Path, tmp_path: Path
) -> None:
    given = [f"run.path={tmp_path / 'b'}", *(word.format(run=trained_once) for word in words)]
    answer = muonscale("train", trained_once, "--extend", *given)
    assert answer.code == 2 and error in answer.err
    assert not (tmp_path / "b").exists()


def test_an_absent_step_is_refused_and_a_damaged_checkpoint_passed_over(
    muonscale: Muonscale, wsd_once: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(wsd_once, tmp_path / "copy"))
    words = ["--extend", "train.steps=20", f"run.path={tmp_path / 'b'}"]
    answer = muonscale("train", f"{run}@7", *words)
    assert answer.code == 2 and "no checkpoint of step 7; it has 12, 9" in answer.err
    (run / "checkpoints" / "step-00000009" / "facts.json").write_text("{")
    answer = muonscale("train", run, *words)
    assert answer.code == 2 and "step 9" in answer.out and "of steps 12, 9" in answer.err


def test_epochs_and_parts_of_the_schedule_stay_where_they_are(
    trained_once: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(trained_once, tmp_path / "run", ignore=lambda *_: ["checkpoints"]))
    config = json.loads((run / "config.json").read_text())
    config["schedule"] |= {
        "name": "stages",
        "stages": [
            {"name": "constant", "until": 0.5, "warmup": 0.5},
            {"name": "wsd", "warmup": 0, "decay": 0.5, "final": 0},
        ],
    }
    (run / "config.json").write_text(json.dumps(config))
    env = json.loads((run / "env.json").read_text())
    (corpus,) = env["data"].values()
    read = corpus["read"]
    rows = round(read["tokens"] / 32 / read["epochs"])
    words = ["train.epochs=0.5", f"run.path={tmp_path / 'b'}"]
    longer = plan_extension(run, None, words)
    assert longer.config.train.tokens == round(rows / 2) * 32
    first, last = longer.config.schedule.stages
    assert (first.until, first.warmup, last.warmup, last.decay) == (6 * 256, 3, 0, 0.5)
    assert longer.common == 10  # the decay begins at step 9, which still has the peak
