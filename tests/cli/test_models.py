from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.conftest import Muonscale

MOONLIGHT = Path(__file__).parents[1] / "fixtures" / "moonlight-16b"


def test_inspect_shows_a_line_for_what_layers_repeat(muonscale: Muonscale) -> None:
    short, full = muonscale("inspect", "llama-pico"), muonscale("inspect", "llama-pico", "--full")
    assert short.code == full.code == 0
    assert "model.layers.{0..1}.self_attn.q_proj.weight" in short.out
    assert "model.layers.1.self_attn.q_proj.weight" in full.out
    assert len(full.out.splitlines()) > len(short.out.splitlines())
    for text in ("Muon: 14 matrices", "factor", "get_output_embeddings()", "adamw"):
        assert text in short.out and text in full.out


def test_inspect_takes_overrides_and_prints_json(muonscale: Muonscale) -> None:
    answer = muonscale("inspect", "llama-pico", "optimizer.lr=0.004", "optimizer.rms=0.4", "--json")
    tree = json.loads(answer.out)
    rows = {row["name"]: row for row in tree["rows"]}
    q = rows["model.layers.0.self_attn.q_proj.weight"]
    assert (q["rule"], q["role"], q["lr"]) == ("muon", "hidden", 0.004)
    assert q["factors"] == [pytest.approx(0.4 * math.sqrt(32))]
    assert q["holds"] == [[1, 32, 32]]
    assert sum(row["size"] for row in tree["rows"]) == tree["parameters"]


def test_lr_prints_a_factor_for_every_shape(muonscale: Muonscale) -> None:
    words = ["--from", "original", "--to", "match_rms_adamw", "--model", MOONLIGHT, "--lr", 0.02]
    tree = json.loads(muonscale("lr", *words, "--json").out)
    factors = {tuple(row["shape"]): (row["factor"], row["count"]) for row in tree["rows"]}
    for (out, in_), (factor, _) in factors.items():
        keller = math.sqrt(max(1, out / in_))
        assert factor == pytest.approx(keller / (0.2 * math.sqrt(max(out, in_))))
    total = sum(count for _, count in factors.values())
    assert total == 5207
    logs = sum(count * math.log(factor) for factor, count in factors.values()) / total
    assert tree["best"] == pytest.approx(math.exp(logs))
    assert tree["converted_lr"] == pytest.approx(0.02 * math.exp(logs))
    text = muonscale("lr", *words).out
    assert f"about {tree['converted_lr']:.4g} under match_rms_adamw" in text
    lowest, highest = (0.02 * pick(f for f, _ in factors.values()) for pick in (min, max))
    assert f"{lowest:.4g} to {highest:.4g}" in text
    assert f"{tree['spread']:.3g}" in text


def test_lr_says_so_where_a_single_number_is_exact(muonscale: Muonscale) -> None:
    words = ["--from", "spectral", "--to", "torch:spectral_unclamped", "--model", "llama-pico"]
    answer = muonscale("lr", *words, "--lr", 0.02)
    assert answer.code == 0 and "the conversion is exact" in answer.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["inspect", "lama-pico"], "llama-pico"),
        (["inspect", "llama-pico", "optimizer.lrs=1"], "optimizer.lrs"),
        (["inspect", "llama-pico", "model.fields.hidden_sizes=8"], "hidden_size"),
        (["lr", "--from", "kellr", "--model", "llama-pico", "--lr", "1"], "keller"),
        (["lr", "--from", "keller", "--model", "lama-pico", "--lr", "1"], "llama-pico"),
        (["lr", "--from", "keller", "--model", "llama-pico", "--lr", "-1"], "--lr"),
    ],
)
def test_a_mistake_gets_a_sentence_and_exit_code_2(
    words: list[str], said: str, muonscale: Muonscale
) -> None:
    answer = muonscale(*words)
    assert answer.code == 2
    assert said in answer.err and "Traceback" not in answer.err
