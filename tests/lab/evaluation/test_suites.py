"""The suites are what the docs say and what the installed harness has."""

from __future__ import annotations

from pathlib import Path

import pytest

from muonscale.errors import ConfigError
from muonscale.lab.evaluation.suites import MOONLIGHT, SUITES, find_suite

DOCS = (Path(__file__).parents[3] / "docs" / "evaluation.md").read_text(encoding="utf-8")


def test_the_docs_have_every_row_and_no_other() -> None:
    rows = {
        f"| {b.name} | `{b.task}` | {b.shots} | `{b.metric}` | {b.paper} | {b.note} |"
        for suite in SUITES.values()
        for b in suite.benchmarks
    }
    table = DOCS.split("| benchmark |")[1].split("\n\n")[0].splitlines()[2:]
    assert set(table) == rows
    assert all(name in DOCS for name in MOONLIGHT.left_out)


def test_the_shots_are_those_of_the_paper() -> None:
    paper = {"MMLU": 5, "MMLU-pro": 5, "BBH": 3, "TriviaQA": 5, "GSM8K": 4, "C-Eval": 5, "CMMLU": 5}
    assert {b.name: b.shots for b in MOONLIGHT.benchmarks if b.name in paper} == paper


def test_tasks_choose_from_a_suite() -> None:
    assert [b.name for b in MOONLIGHT.select(("cmmlu", "mmlu"))] == ["CMMLU", "MMLU"]
    with pytest.raises(ConfigError, match="gsm8k"):
        MOONLIGHT.select(("gsm8",))
    with pytest.raises(ConfigError, match="did you mean moonlight"):
        find_suite("monlight")


@pytest.mark.slow
def test_the_harness_has_the_tasks_with_these_metrics_and_two_run_code() -> None:
    tasks = pytest.importorskip("lm_eval.tasks")
    from lm_eval.tasks._index import Kind
    from lm_eval.tasks._yaml_loader import load_yaml

    manager = tasks.TaskManager()
    assert not any("cmath" in name for name in manager.all_tasks)
    run_code: set[str] = set()
    for benchmark in MOONLIGHT.benchmarks:
        entry = manager.task_index[benchmark.task]
        metric, kept = benchmark.metric.split(",")
        groups = [entry]
        while groups[-1].kind == Kind.GROUP:
            listed = {each["metric"] for each in groups[-1].cfg.get("aggregate_metric_list", [])}
            assert not listed or metric in listed, benchmark.name
            first = groups[-1].cfg["task"][0]
            first = manager.task_index[first if isinstance(first, str) else first["task"]]
            if first.kind == Kind.TAG:
                tagged = (e for e in manager.task_index.values() if first.name in e.tags)
                first = next(entry for entry in tagged if entry.kind == Kind.TASK)
            groups.append(first)
        leaf = load_yaml(groups[-1].yaml_path, resolve_func=False, recursive=True)
        filters = {each["name"] for each in leaf.get("filter_list", [])} or {"none"}
        assert kept in filters, benchmark.name
        metrics = " ".join(str(each["metric"]) for each in leaf["metric_list"])
        assert metric.replace("@1", "_at_k") in metrics, benchmark.name
        run_code |= {benchmark.task} if leaf.get("unsafe_code") else set()
        assert benchmark.shots == 0 or leaf.get("num_fewshot") != 0, benchmark.name
    assert run_code == {"humaneval", "mbpp"}
