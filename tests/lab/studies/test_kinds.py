from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from muonscale.errors import ConfigError
from muonscale.lab.studies.compare.config import CompareConfig
from muonscale.lab.studies.compare.study import CompareStudy
from muonscale.lab.studies.kinds import load_study, study_names
from muonscale.lab.studies.planned_run import index_runs
from muonscale.lab.studies.telescope.config import TelescopeConfig

RECIPE = """
study: compare
path: out
variants: [adamw, muon]
baselines: [adamw]
search: {keys: {lr: {key: optimizer.lr, start: 0.01}}}
set: {train.tokens: 1_000_000}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE)
    return str(path)


def test_overrides_replace_keys(recipe: str) -> None:
    study = load_study(
        recipe, ["search.keys.lr.start=0.1", "set.train.tokens=5000", "executor.workers=3"]
    )
    config = study.config
    assert isinstance(config, CompareConfig)
    assert config.search.keys["lr"].start == 0.1
    assert config.set == {"train.tokens": 5000}
    assert config.executor.workers == 3
    assert isinstance(study, CompareStudy)


def test_overrides_reach_keys_of_any_depth() -> None:
    study = load_study(
        "telescope-nano", ["hyperparameters.lr.center=0.03", "executor.slurm.timeout_min=5"]
    )
    assert isinstance(study.config, TelescopeConfig)
    assert study.config.hyperparameters["lr"].center == 0.03
    assert study.config.hyperparameters["lr"].key == "optimizer.lr"
    assert study.config.executor.slurm == {"timeout_min": 5}


@pytest.mark.parametrize("name", study_names())
def test_shipped_studies_can_be_planned(name: str) -> None:
    study = load_study(name)
    assert index_runs(study.plan({}))
    assert study.config.path == Path("studies") / name


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sed=[1]", "unknown key sed; did you mean seeds"),
        ("executor.worker=1", r"unknown key executor\.worker; did you mean workers"),
        ("executor.workers=0", r"executor\.workers=0: "),
        ("study=comparison", "did you mean compare"),
        ("baselines=[sgd]", "baselines: 'sgd' is none of the variants"),
        ("seeds", "'seeds'"),
        ("train.tokens=3", r"set\.section\.key=value"),
        ("seeds=[1", "not valid YAML"),
        ("executor.workers.two=1", r"executor\.workers="),
        ("baselines.muon=1", r"baselines\.muon: muon"),
    ],
)
def test_wrong_overrides_are_refused(recipe: str, override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_study(recipe, [override])


def test_a_wrong_key_inside_a_named_item_is_told(tmp_path: Path) -> None:
    override = "hyperparameters={lr: {key: optimizer.lr, centre: 1}}"
    with pytest.raises(ConfigError, match=r"hyperparameters\.lr\.centre; did you mean center"):
        load_study("telescope-nano", [override])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("study: compare", "path is required"),
        ("[1, 2]", "1, 2"),
        ("study: [", "not valid"),
        ("study: [compare]", r"study=\['compare'\]"),
        (
            "study: compare\npath: x\nbase: demo\nvariants: [[]]",
            r"variants=\[\[\]\] must be a list of names",
        ),
        ("path: !!timestamp now", "a value does not fit its type"),
        ("path: x", "study=None"),
    ],
)
def test_wrong_recipes_are_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_study(str(path))


def test_unknown_studies_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown study 'muon-adam'.*muon-adamw-nano"):
        load_study("muon-adam")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_study(str(tmp_path))


def test_an_override_reaches_an_item_of_a_list(recipe: str) -> None:
    config = load_study(recipe, ["seeds=[3, 4]", "seeds.1=5"]).config
    assert isinstance(config, CompareConfig)
    assert config.seeds == [3, 5]


def test_the_status_of_a_study_needs_no_scipy(tmp_path: Path) -> None:
    """A telescope does, and so does transformers where a plan depends on the shape of the model."""
    code = (
        "import sys\n"
        "from muonscale.lab.studies.engine import look\n"
        "from muonscale.lab.studies.kinds import load_study\n"
        "for name in ('muon-adamw', 'scaling', 'transfer'):\n"
        "    load_study(name + '-nano')\n"
        f"look(load_study('batch-nano', ['path={tmp_path}/study']))\n"
        "assert 'scipy' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_folder_of_a_study_is_where_it_is_now(recipe: str, tmp_path: Path) -> None:
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "study.json").write_text(
            json.dumps(load_study(recipe).config.model_dump(mode="json"))
        )
        assert load_study(str(tmp_path / name)).config.path == tmp_path / name
    assert load_study(str(tmp_path / "after"), ["path=other"]).config.path == Path("other")
