from __future__ import annotations

import fcntl
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from muonscale.errors import StudyError
from muonscale.lab.estimate import run_cost as of_run
from muonscale.lab.report.page import Page, PageSection, Verdict
from muonscale.lab.studies.config import StudyConfig
from muonscale.lab.studies.engine import look, plan_study, run_study
from muonscale.lab.studies.execute.folder import StudyFolder
from muonscale.lab.studies.planned_run import PlannedRun, Planner
from muonscale.lab.studies.study import Outcomes, Study


@dataclass
class Losses:
    """The smallest study: runs that differ in what they are told, and their losses."""

    config: StudyConfig
    each: dict[str, dict[str, Any]]

    def plan(self, outcomes: Outcomes) -> list[PlannedRun]:
        planner = Planner(self.config)
        return [planner.run({"run": name}, keys, seed=0) for name, keys in self.each.items()]

    def analyze(self, outcomes: Outcomes) -> dict[str, Any]:
        return {"losses": {o.run.label: o.loss for o in outcomes.values()}}

    def report(self, found: Any, outcomes: Outcomes) -> Page:
        known = Verdict(True, f"{len(found['losses'])} losses are known")
        section = PageSection(title="Verdict", blocks=(known,))
        return Page(title="losses", summary=json.dumps(found), sections=(section,))


Make = Callable[..., Losses]


@pytest.fixture
def losses(tiny_keys: dict[str, Any], tmp_path: Path) -> Make:
    def make(each: dict[str, dict[str, Any]], **keys: Any) -> Losses:
        given = {"study": "losses", "path": tmp_path / "study", "set": tiny_keys}
        return Losses(
            StudyConfig.model_validate(given | {"executor": {"kind": "inline"}} | keys), each
        )

    return make


TWO: dict[str, dict[str, Any]] = {"a": {}, "b": {"optimizer.lr": 0.05}}


COST = of_run.RunCost(
    parameters=9, without_embeddings=8, flops_per_token=7, newton_schulz_flops=6, steps=5, tokens=4
)


def silent(line: str) -> None:
    pass


def mtimes(study: Study) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in study.config.path.glob("runs/*/result.json")}


def test_runs_are_done_once(losses: Make) -> None:
    study, said = losses(TWO), list[str]()
    found = run_study(study, said.append)
    assert found["losses"]["a"] != found["losses"]["b"]
    assert said[0].startswith("2 of 2 runs to do")
    assert said[2].startswith("[2/2] b: validation loss")
    before = mtimes(study)
    again = run_study(study, said.append)
    assert again == found
    assert mtimes(study) == before
    assert said[3:] == 2 * ["holds: 2 losses are known"]  # the second call says only the verdict
    folder = StudyFolder(study.config.path)
    assert folder.result == found
    assert "losses" in (folder.path / "report" / "report.html").read_text()
    more = losses({**TWO, "c": {"optimizer.lr": 0.01}})  # a study may grow
    assert set(run_study(more, silent)["losses"]) == {"a", "b", "c"}
    assert before.items() <= mtimes(more).items()


def test_a_report_that_fails_costs_no_result(losses: Make) -> None:
    study, said = losses({"a": {}}), list[str]()
    report = study.config.path / "report"
    report.parent.mkdir()
    (report.parent / "study.json").write_text("{}")
    report.write_text("in the way")
    with pytest.raises(StudyError, match=r"results are in .*result\.json.* muonscale report "):
        run_study(study, said.append)
    assert said[-1] == "holds: 1 losses are known"
    assert StudyFolder(study.config.path).result is not None
    report.unlink()
    assert run_study(study, silent)["losses"]


@pytest.mark.slow
def test_a_run_is_what_train_would_do(losses: Make, tmp_path: Path) -> None:
    study = losses({"a": {}})
    run_study(study, silent)
    (config,) = (study.config.path / "configs").iterdir()
    (folder,) = (study.config.path / "runs").iterdir()
    words = ["-m", "muonscale", "train", str(config), f"run.path={tmp_path / 'alone'}"]
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
    weights = "model/model.safetensors"
    assert (folder / weights).read_bytes() == (tmp_path / "alone" / weights).read_bytes()


def test_a_failed_run_is_reported_and_the_others_are_done(losses: Make, tmp_path: Path) -> None:
    missing = tmp_path / "missing.txt"
    study = losses({"bad": {"data.path": str(missing)}, "good": {}})
    found = run_study(study, silent)
    assert [item["run"] for item in found["failed"]] == ["bad"]
    assert str(missing) in found["failed"][0]["reason"]
    assert found["losses"]["good"] < 6
    said: list[str] = []
    run_study(study, said.append)  # not tried for ever
    assert said == ["holds: 2 losses are known"]
    missing.write_text(Path(study.config.set["data.path"]).read_text())
    assert run_study(study, silent, retry=True)["failed"] == []


def test_divergence_is_an_outcome_and_not_a_failure(losses: Make) -> None:
    study = losses({"hot": {"optimizer.lr": 1e30}})
    found = run_study(study, silent)
    assert found["failed"] == []
    (outcome,) = look(study).outcomes.values()
    assert (outcome.state, outcome.loss) == ("diverged", float("inf"))


def test_a_run_is_found_by_its_id_whatever_it_was_called(losses: Make) -> None:
    study = losses(TWO)
    run_study(study, silent)
    (a, _) = study.plan({})
    made = StudyFolder(study.config.path).run_folder(a).path
    made.rename(made.with_name(f"former-name-{a.id}"))
    assert look(study).outcomes[a.id].folder.path.name == f"former-name-{a.id}"
    assert look(study).missing == []


def test_flops_are_counted_once_for_all_rounds(
    losses: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = []
    monkeypatch.setattr(of_run, "run_cost", lambda config: counted.append(config) or COST)
    study = losses(TWO)
    run_study(study, silent)
    assert len(counted) == 1  # the learning rate does not change the work of a step
    rows = json.loads((study.config.path / "plan.json").read_text())["runs"]
    assert [row["flops_per_token"] for row in rows] == [COST.flops_per_token] * 2


def test_nobody_else_may_run_it(losses: Make) -> None:
    study = losses(TWO)
    with (
        StudyFolder(study.config.path).locked(),
        pytest.raises(StudyError, match="another process"),
    ):
        run_study(study, silent)


def test_a_run_that_is_being_trained_is_seen(losses: Make) -> None:
    study = losses({"a": {}})
    folder = StudyFolder(study.config.path)
    (run,) = study.plan({})
    place = folder.run_folder(run).path
    place.mkdir(parents=True)
    with (place / "run.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert folder.outcome(run).state == "running"
    assert folder.outcome(run).state == "waiting"


def test_a_folder_with_other_files_is_left_alone(losses: Make) -> None:
    study = losses(TWO)
    study.config.path.mkdir()
    (study.config.path / "thesis.tex").write_text("")
    with pytest.raises(StudyError, match="holds other files"):
        run_study(study, silent)


def test_a_run_under_other_defaults_is_not_taken_for_the_same(losses: Make) -> None:
    study = losses({"a": {}})
    run_study(study, silent)
    (config,) = study.config.path.glob("runs/*/config.json")
    tree = json.loads(config.read_text())
    tree["optimizer"]["momentum"] = 0.9  # as if that had been the default
    config.write_text(json.dumps(tree))
    with pytest.raises(StudyError, match=r"optimizer\.momentum=0\.9, which is 0\.95 now"):
        look(study)


def test_a_plan_writes_nothing_and_knows_the_cost(losses: Make) -> None:
    study = losses({**TWO, "long": {"train.steps": 60}})
    state, cost = plan_study(study)
    assert not study.config.path.exists()
    assert len(state.missing) == 3
    number, tokens, flops = cost.total(state.runs)
    assert (number, tokens) == (3, (6 + 6 + 60) * 256)
    assert flops == sum(c.flops for c in cost.runs.values()) > 0
    a, _, long = state.runs
    assert cost.seconds[long] == pytest.approx(10 * cost.seconds[a])


def test_stated_speed_gives_the_hours(losses: Make) -> None:
    study = losses(TWO, executor={"kind": "inline", "flops_per_second": 1e6})
    state, cost = plan_study(study)
    _, _, flops = cost.total(state.runs)
    assert cost.hours(state.runs) == pytest.approx(flops / 1e6 / 3600)


@pytest.mark.slow
def test_a_pool_does_the_same(losses: Make, tmp_path: Path) -> None:
    inline = run_study(losses(TWO), silent)
    pool = losses(TWO, path=tmp_path / "pool", executor={"kind": "local", "workers": 2})
    assert run_study(pool, silent) == inline


@pytest.mark.slow
def test_a_worker_that_dies_is_a_failure_and_the_pool_goes_on(
    losses: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # A kernel out of memory kills without a word: let the process of every run named `a` do so.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal\n"
        "import muonscale.lab.studies.execute.worker as worker\n"
        "train = worker.train_run\n"
        "def dying(config, failure):\n"
        "    if config.name.startswith('a'):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return train(config, failure)\n"
        "worker.train_run = dying\n"
    )
    script = tmp_path / "worker.py"
    script.write_text(
        "import sitecustomize\nfrom muonscale.lab.studies.execute import worker\nworker.serve()\n"
    )
    popen = subprocess.Popen

    def start(words: list[str], **options: Any) -> Any:
        return popen([sys.executable, str(script)], **options)

    monkeypatch.setattr("muonscale.lab.studies.execute.local.subprocess.Popen", start)
    found = run_study(losses(TWO, executor={"workers": 1}), silent)
    assert [item["run"] for item in found["failed"]] == ["a"]
    assert f"signal {int(signal.SIGKILL)}" in found["failed"][0]["reason"]
    assert found["losses"]["b"] < 6


@pytest.mark.parametrize(
    ("executor", "said"),
    [
        ({"kind": "inline", "workers": 2}, "one run at a time"),
        ({"kind": "local", "slurm": {"timeout_min": 3}}, "executor.kind=slurm"),
    ],
)
def test_options_of_another_executor_are_refused(
    losses: Make, executor: dict[str, Any], said: str
) -> None:
    with pytest.raises(StudyError, match=said):
        run_study(losses(TWO, executor=executor), silent)
