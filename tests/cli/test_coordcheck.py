"""`muonscale coordcheck` as a command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Muonscale

QUICK = ["--widths", "16,32,64", "--seeds", "1", "--steps", "3", "--batch-tokens", "256"]


def test_a_standard_parametrization_fails_with_exit_code_1_and_leaves_its_files(
    muonscale: Muonscale, tiny: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "check"
    answer = muonscale("coordcheck", *tiny, *QUICK, "--convention", "standard", "--out", out)
    assert answer.code == 1, answer.err
    assert "FAIL: depends on the width: " in answer.out
    for said in (
        "widths 16, 32, 64",
        "transfer.convention=standard",
        "attention logits",
        "0 +- 0.1",
    ):
        assert said in answer.out
    assert "width 64, seed 0: loss" in answer.err
    facts = json.loads((out / "coordcheck.json").read_text())
    assert not facts["passed"] and facts["widths"] == [16, 32, 64]
    assert (out / "coordcheck.png").stat().st_size > 10_000
    assert "<svg" in (out / "coordcheck.svg").read_text()
    assert not (tmp_path / "run").exists()


def test_json_is_all_that_is_printed_and_the_exit_code_is_that_of_the_verdict(
    muonscale: Muonscale, tiny: list[str]
) -> None:
    answer = muonscale("coordcheck", *tiny, *QUICK, "--json")
    facts = json.loads(answer.out)
    assert answer.code == (0 if facts["passed"] else 1)
    assert {row["quantity"] for row in facts["rows"]} == {
        "start", "size", "change", "weight", "update",
    }  # fmt: skip
    parts = {row["part"] for row in facts["rows"]}
    assert parts == {part["part"] for part in facts["parts"]} >= {"attention", "head", "logits"}
    shape = [len(facts["values"][0]["values"]), len(facts["values"][0]["values"][0])]
    assert shape == [1, 3]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--widths", "64"], "at least 3 different widths"),
        (["--widths", "32,sixty,128"], "--widths 32,sixty,128"),
        (["--widths", "32,50,128"], "multiples of 16"),
        (["--convention", "mup"], "'mup'"),
        (["--grow", "depth"], "grow is 'depth'"),
    ],
)
def test_a_mistake_gets_a_sentence_and_exit_code_2(
    words: list[str], said: str, muonscale: Muonscale, tiny: list[str]
) -> None:
    answer = muonscale("coordcheck", *tiny, *words)
    assert answer.code == 2 and said in answer.err, answer.err
