"""Checks of a very small Llama: right, and broken on purpose."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from muonscale.errors import ConfigError, StudyError
from muonscale.lab.coordcheck.page import coordcheck_page, draw_check, write_check
from muonscale.lab.coordcheck.plan import CoordcheckRequest, plan_check
from muonscale.lab.coordcheck.text import check_text, verdict_line
from muonscale.lab.report.folders import page_of
from muonscale.lab.report.page import Chart, Table, Verdict
from muonscale.optim.parameters.roles import Role
from muonscale.transfer import parametrization
from muonscale.transfer.multipliers import Multipliers
from tests.lab.coordcheck.checks import bad_parts, facts_of, small

Change = Callable[[Role, Multipliers], Multipliers]
TIED = ["model.fields.tie_word_embeddings=true"]


@pytest.fixture(scope="module")
def right(corpus_file: Path, cache: Path) -> dict[str, Any]:
    return facts_of(small(corpus_file, cache, widths=(32, 64, 128), seeds=3))


def failed(facts: dict[str, Any]) -> set[tuple[str, str]]:
    rows = facts["rows"]
    return {(row["part"], row["quantity"]) for row in rows if row["outcome"] == "fail"}


def test_a_right_rule_passes(right: dict[str, Any]) -> None:
    assert right["passed"] and not bad_parts(right), check_text(right)
    slopes = {(row["part"], row["quantity"], row["name"]): row["slope"] for row in right["rows"]}
    # A random head adds up a root of the width and is divided by the width.
    assert slopes["logits", "start", "logits"] == pytest.approx(-0.5, abs=0.1)
    assert slopes["attention", "update", "model.layers.*.self_attn.v_proj.weight"] == (
        pytest.approx(0, abs=0.05)
    )
    quantities = {row["quantity"] for row in right["rows"]}
    assert quantities == {"start", "size", "change", "weight", "update"}


BROKEN: dict[str, tuple[Change, set[tuple[str, str]]]] = {
    "no rule for hidden matrices": (
        lambda role, m: replace(m, lr=1.0) if role == Role.HIDDEN else m,
        {("attention", "update"), ("attention", "change"), ("feed-forward", "update")},
    ),
    "a head as if it were hidden": (
        lambda role, m: replace(m, lr=m.lr**0.5) if role == Role.HEAD else m,
        {("logits", "change"), ("head", "update")},
    ),
    "a head of constant rate": (
        lambda role, m: replace(m, lr=1.0) if role == Role.HEAD else m,
        {("logits", "change"), ("logits", "size"), ("head", "update")},
    ),
    "a factor applied twice": (
        lambda role, m: replace(m, lr=m.lr**2) if role == Role.HIDDEN else m,
        {("attention", "update"), ("feed-forward", "update")},
    ),
    "no rule for initial weights": (
        lambda role, m: replace(m, init=1.0),
        {("attention", "start"), ("feed-forward", "start"), ("logits", "start")},
    ),
}


@pytest.mark.parametrize("rule", ["no rule for hidden matrices", "a head as if it were hidden"])
def test_a_broken_rule_fails_where_it_is_broken(
    rule: str, monkeypatch: pytest.MonkeyPatch, corpus_file: Path, cache: Path
) -> None:
    check_broken(rule, monkeypatch, corpus_file, cache)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule",
    ["a head of constant rate", "a factor applied twice", "no rule for initial weights"],
)
def test_other_broken_rules_fail_too(
    rule: str, monkeypatch: pytest.MonkeyPatch, corpus_file: Path, cache: Path
) -> None:
    check_broken(rule, monkeypatch, corpus_file, cache)


def check_broken(
    rule: str, monkeypatch: pytest.MonkeyPatch, corpus_file: Path, cache: Path
) -> None:
    change, expected = BROKEN[rule]
    good = parametrization.multipliers
    monkeypatch.setattr(
        parametrization, "multipliers", lambda role, *rest: change(role, good(role, *rest))
    )
    facts = facts_of(small(corpus_file, cache))
    assert not facts["passed"]
    assert expected <= failed(facts), check_text(facts, full=True)
    assert {part for part, _ in expected} <= bad_parts(facts)


@pytest.mark.slow
def test_a_tied_head_without_its_fold_fails_and_with_it_nothing_does(
    monkeypatch: pytest.MonkeyPatch, corpus_file: Path, cache: Path
) -> None:
    asked = small(corpus_file, cache, overrides=TIED)
    assert not failed(facts_of(asked))
    monkeypatch.setattr(parametrization, "width_folds", lambda pair: {})
    assert {("logits", "start"), ("logits", "change")} <= failed(facts_of(asked))


MORE: dict[str, Any] = {"widths": (32, 64, 128, 256), "seeds": 3, "steps": 6, "batch_tokens": 512}


@pytest.mark.slow
def test_over_a_factor_of_8_spectral_passes_and_standard_fails(
    corpus_file: Path, cache: Path
) -> None:
    facts = facts_of(small(corpus_file, cache, **MORE))
    assert facts["passed"], check_text(facts)
    facts = facts_of(small(corpus_file, cache, convention="standard", **MORE))
    assert {("attention", "change"), ("feed-forward", "update")} <= failed(facts)


@pytest.mark.slow
def test_with_adamw_alone_nothing_of_spectral_fails_and_standard_does(
    corpus_file: Path, cache: Path
) -> None:
    words = ["optimizer.rule=adamw", "optimizer.lr=0.003"]
    facts = facts_of(small(corpus_file, cache, overrides=words, **MORE))
    assert not failed(facts), check_text(facts)
    facts = facts_of(small(corpus_file, cache, overrides=words, convention="standard", **MORE))
    assert {("attention", "change"), ("attention", "update"), ("logits", "change")} <= failed(facts)


@pytest.mark.slow
def test_scores_of_longer_heads_need_their_fold(
    monkeypatch: pytest.MonkeyPatch, corpus_file: Path, cache: Path
) -> None:
    asked = small(corpus_file, cache, grow="head_dim", widths=(16, 32, 64, 128), seeds=3)
    assert not failed(facts := facts_of(asked)), check_text(facts)
    monkeypatch.setattr(parametrization, "width_folds", lambda pair: {})
    assert failed(facts_of(asked)) == {("attention logits", "start")}


def test_text_page_and_figure_say_the_same(right: dict[str, Any], tmp_path: Path) -> None:
    text, full = check_text(right), check_text(right, full=True)
    assert verdict_line(right) in text and "llama-pico (llama, 2 layers)" in text
    assert "self_attn.k_proj.weight" in full and len(full) > len(text)
    page = coordcheck_page(right)
    assert page.summary == verdict_line(right)
    blocks = [block for section in page.sections for block in section.blocks]
    (verdict,) = [block for block in blocks if isinstance(block, Verdict)]
    assert verdict.passed is True
    (table,) = [block for block in blocks if isinstance(block, Table)]
    assert all(len(row) == len(table.head) for row in table.rows)
    charts = [block for block in blocks if isinstance(block, Chart)]
    assert len({chart.name for chart in charts}) == len(charts) == 8
    for series in charts[0].series:
        assert series.x == (32, 64, 128) and series.y[0] == pytest.approx(1)
    write_check(right, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "coordcheck.json").read_text()) == right
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json", ".png", ".svg"}
    assert page_of([tmp_path / "out"]) == page
    svg = draw_check(right)["svg"].decode()
    for part in right["parts"]:
        assert f"<!-- {part['part']} -->" in svg


def test_an_output_folder_that_cannot_be_made_is_named(
    right: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--out .*file cannot be written"):
        write_check(right, tmp_path / "file")


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_damaged_check_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "coordcheck.json").write_text(content)
    with pytest.raises(StudyError, match=r"coordcheck\.json"):
        page_of([tmp_path])


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"widths": (32,)}, "--widths 32: .* at least 3"),
        ({"widths": (32, 64)}, "--widths 32,64: .* at least 3 different"),
        ({"widths": (32, 32, 64)}, "at least 3 different"),
        ({"widths": (32, 40, 64)}, "cannot have the width 40 .* multiples of 16"),
        ({"convention": "spectrl"}, "'spectrl': did you mean spectral"),
        ({"steps": 2}, "--steps 2"),
        ({"seeds": 0}, "--seeds 0"),
        ({"grow": "head"}, "grow is 'head'"),
        (
            {"overrides": ("model.weights=.", "data.tokenizer=.")},
            r"model\.weights=\. needs|weights",
        ),
        ({"target": "llama-pic"}, "llama-pic"),
    ],
)
def test_what_cannot_be_checked_is_refused(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        plan_check(CoordcheckRequest(**{"target": "llama-pico", **asked}))


def test_a_recipe_and_a_preset_are_taken_and_the_widths_are_8_apart() -> None:
    plan = plan_check(CoordcheckRequest(target="gpt-nano"))
    assert plan.widths == (32, 64, 128, 256) and not plan.notes
    plan = plan_check(CoordcheckRequest(target="llama-pico", overrides=["data.sequence_length=64"]))
    assert plan.config.model.preset == "llama-pico" and plan.config.data.source == "python-stdlib"
    wide = plan.at(64, 2)
    assert wide.run.seed == plan.config.run.seed + 2
    assert wide.model.fields["hidden_size"] == 64
    assert wide.transfer.base is not None and wide.transfer.base["hidden_size"] == 32  # type: ignore[index]
    assert (wide.schedule.name, wide.schedule.warmup, wide.optimizer.ns_dtype) == (
        "constant", 0, "float32",
    )  # fmt: skip


def test_a_gain_that_must_not_decay_does_not_and_that_is_said() -> None:
    plan = plan_check(CoordcheckRequest(target="gemma-nano"))
    assert plan.widths[0] == 64
    assert plan.config.optimizer.overrides == {"model.norm.weight": {"weight_decay": 0.0}}
    assert "no weight decay of model.norm.weight" in plan.notes[0]
    given = "optimizer.overrides={model.norm.weight: {weight_decay: 0}}"
    assert not plan_check(CoordcheckRequest(target="gemma-nano", overrides=[given])).notes
    assert not plan_check(CoordcheckRequest(target="gemma-nano", convention="standard")).notes


def test_a_base_of_ones_own_is_set_aside_and_that_is_said() -> None:
    plan = plan_check(
        CoordcheckRequest(target="llama-pico", overrides=["transfer.base={hidden_size: 16}"])
    )
    assert "the base is the width 32" in plan.notes[0]
