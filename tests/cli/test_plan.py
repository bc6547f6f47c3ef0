from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Muonscale

MOONLIGHT = Path(__file__).parents[1] / "fixtures" / "moonlight-16b"


def test_plan_prints_a_table(muonscale: Muonscale) -> None:
    answer = muonscale("plan", "demo", "--device", "cpu")
    assert answer.code == 0, answer.err
    for text in (
        "memory per device",
        "Newton-Schulz",
        "time of a step",
        "assumptions",
        "342 steps",
    ):
        assert text in answer.out


def test_plan_prints_json_and_takes_every_option(muonscale: Muonscale, tmp_path: Path) -> None:
    words = ["plan", "llama-pico", "train.batch_tokens=2048", "train.steps=10", "--layout"]
    words += ["fsdp=2,tp=2", "--devices", "4", "--device", "a100-80gb", "--mfu", "0.5"]
    words += ["--bandwidth", "10", "--micro-batch", "512", "--json", "--figure"]
    answer = muonscale(*words, tmp_path / "plan.png")
    assert answer.code == 0, answer.err
    tree = json.loads(answer.out)
    assert tree["layout"]["layout"] == "fsdp=2,tp=2" and tree["layout"]["micro_batches"] == 2
    assert tree["time"]["steps"] == 10
    values = {row["what"]: row["value"] for row in tree["assumptions"]}
    assert values["MFU of the model"] == "0.5"
    assert values["between machines"] == "10 GB/s per device"
    assert (tmp_path / "plan.png").exists()


def test_a_suggestion_is_a_recipe(muonscale: Muonscale, tmp_path: Path) -> None:
    answer = muonscale("plan", "demo", "--devices", 2, "--suggest")
    assert answer.code == 0, answer.err
    (tmp_path / "tuned.yaml").write_text(answer.out)
    again = muonscale("plan", tmp_path / "tuned.yaml", "--devices", 2, "--json")
    shown = json.loads(again.out)["layout"]
    first = json.loads(muonscale("plan", "demo", "--devices", 2, "--suggest", "--json").out)
    best = first["choices"][0]
    assert shown["layout"] == best["layout"]
    assert shown["micro_batch_tokens"] == best["micro_batch_tokens"]
    assert f"# Layouts of 2 x h100 that fit into {first['room']}" in answer.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lama-pico"], "llama-pico"),
        (["llama-pico", "--device", "h10"], "h100"),
        (["llama-pico", "--layout", "fsdp=2x2"], "not valid"),
        (["demo", "--suggest", "--figure", "plan.png"], "leave out --suggest"),
        (["llama-pico", "--figure", "plan.gif"], ".png or .svg"),
        (["llama-pico", "--figure", "nowhere/plan.png"], "no folder"),
        (["llama-pico", "train.batch_token=3"], "batch_tokens"),
    ],
)
def test_a_mistake_gets_a_sentence_and_exit_code_2(
    words: list[str], said: str, muonscale: Muonscale
) -> None:
    answer = muonscale("plan", *words)
    assert answer.code == 2
    assert said in answer.err and "Traceback" not in answer.err


@pytest.mark.slow
@pytest.mark.parametrize("devices", [64, 4096])
def test_moonlight_is_planned_within_two_gigabytes(devices: int) -> None:
    def limits() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (2 * 2**30, 2 * 2**30))

    words = [sys.executable, "-m", "muonscale", "plan", str(MOONLIGHT), "--devices", str(devices)]
    answer = subprocess.run([*words, "--json"], capture_output=True, text=True, preexec_fn=limits)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["balance"]["matrices"] == 5207
