"""`muonscale verify` with processes of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from muonscale.lab.verify import check
from tests.conftest import Muonscale


@pytest.mark.slow
def test_a_layout_is_verified_and_nothing_is_written(
    muonscale: Muonscale, tiny: list[str], tmp_path: Path
) -> None:
    answer = muonscale("verify", *tiny, "--layout", "fsdp=2", "--steps", 2)
    assert answer.code == 0, answer.err
    assert "same: fsdp=2 differs from one process by at most" in answer.out
    for text in ("step 2", "raw gradients", "layers.{0..1}.mlp.down_proj.weight", "hidden"):
        assert text in answer.out
    assert "2 steps on 2 processes (fsdp=2)" in answer.err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_json_says_the_same_and_one_that_is_not_the_same_gives_exit_code_1(
    muonscale: Muonscale, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = check.layout_config
    # As if the ranks had other initial weights and other data.
    monkeypatch.setattr(
        check,
        "layout_config",
        lambda c, t: layout(c.model_copy(update={"run": c.run.model_copy(update={"seed": 9})}), t),
    )
    answer = muonscale("verify", *tiny, "--layout", "tp=2,sp", "--steps", 3, "--json")
    assert answer.code == 1, answer.err
    found = json.loads(answer.out)
    assert set(found) == {
        "model", "layout", "processes", "steps", "precision", "ns_dtype", "limit", "same", "worst",
        "loss", "losses", "gradients", "weights",
    }  # fmt: skip
    assert (found["layout"], found["processes"], found["same"]) == ("tp=2,sp", 2, False)
    assert len(found["losses"]) == len(found["loss"]["layout"]) == found["steps"] == 3
    assert set(found["weights"][0]) == {
        "name", "group", "difference", "reordered", "rounding", "ratio", "within",
    }  # fmt: skip
    assert not any(row["within"] for row in found["gradients"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--layout"),
        (["--layout", "fsdp=two"], "'fsdp=two' is not valid"),
        (["--layout", "fsdp=1"], "one process"),
        (["--layout", "tp=3"], "does not divide num_attention_heads"),
        (["--layout", "fsdp=2", "--steps", 13], "--steps 13"),
        (["--layout", "fsdp=2", "model.fields.attention_dropout=0.1"], "attention_dropout=0"),
        pytest.param(
            ["--layout", "fsdp=2", "optimizer.lr=1e30", "schedule.warmup=0"],
            "of 2: the gradient of ",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_mistake_gets_a_sentence_and_exit_code_2(
    words: list[object], said: str, muonscale: Muonscale, tiny: list[str]
) -> None:
    answer = muonscale("verify", *tiny, *words)
    assert answer.code == 2
    assert said in answer.err and "Traceback" not in answer.err
