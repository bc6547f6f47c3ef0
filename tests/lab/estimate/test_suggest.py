from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from muonscale.errors import ConfigError
from muonscale.lab.config.load import load_config
from muonscale.lab.devices import find_device
from muonscale.lab.estimate import suggest as suggesting
from muonscale.lab.estimate.estimate import estimate
from muonscale.lab.estimate.resolve import PlanRequest
from muonscale.lab.estimate.suggest import layouts, suggest
from muonscale.lab.estimate.text import suggestion_text

PICO = [
    "model.preset=llama-pico", "data.vocab_size=300", "data.sequence_length=64",
    "train.batch_tokens=1024", "eval.batch_tokens=64",
]  # fmt: skip
"""16 sequences to a batch, 4 to each of 4 devices."""


def request(**keys: Any) -> PlanRequest:
    return PlanRequest(**{"target": "demo", "overrides": PICO, "devices": 4} | keys)


@cache
def every_estimate() -> dict[tuple[str, int, bool], tuple[int, float]]:
    """Return peak and time of every layout, micro-batch and checkpointing, one by one."""
    found = {}
    for layout in ("fsdp=4", "ddp=4", "fsdp=2,tp=2,sp"):
        share = 1024 // (2 if "tp=2" in layout else 4)
        for size, recompute in itertools.product((64, 128, 256, 512), (False, True)):
            if size <= share:
                keys = [f"train.activation_checkpointing={str(recompute).lower()}"]
                asked = request(overrides=[*PICO, *keys], layout=layout, micro_batch=size)
                facts = estimate(asked)
                found[layout, size, recompute] = facts["memory"]["peak"], facts["time"]["step"]
    return found


def test_the_first_choice_is_the_fastest_of_all_that_fit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    every = every_estimate()
    memory = find_device("h100").memory
    peaks = sorted({peak for peak, _ in every.values()})
    for limit in (peaks[1], peaks[len(peaks) // 2], peaks[-1]):
        monkeypatch.setattr(suggesting, "ROOM", limit / memory)
        fitting = {key: each for key, each in every.items() if each[0] <= limit}
        facts = suggest(request())
        first = facts["choices"][0]
        key = first["layout"], first["micro_batch_tokens"], first["activation_checkpointing"]
        assert (first["peak"], first["step"]) == fitting[key]
        assert first["step"] <= min(step for _, step in fitting.values()) * (1 + suggesting.SAME)
        for row in facts["choices"]:  # no larger micro-batch of the same kind fits
            kind = [k for k in fitting if (k[0], k[2]) == (row["layout"], row[
                "activation_checkpointing"])]  # fmt: skip
            assert row["micro_batch_tokens"] == max(size for _, size, _ in kind)

        path = tmp_path / "tuned.yaml"  # the recipe that is printed is the first choice
        path.write_text(suggestion_text(facts))
        again = estimate(PlanRequest(target=str(path), devices=4))
        assert again["layout"]["layout"] == first["layout"]
        assert (again["memory"]["peak"], again["time"]["step"]) == fitting[key]
        assert load_config(str(path)).optimizer == load_config("demo", PICO).optimizer


def test_where_nothing_fits_the_nearest_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suggesting, "ROOM", 1e-9)
    (layout, size, recompute), _ = min(every_estimate().items(), key=lambda item: item[1][0])
    text = f"nearest is {layout}, micro-batches of {size} tokens" + ", activation" * recompute
    with pytest.raises(ConfigError, match=text):
        suggest(request())


def test_layouts_stay_within_machines_and_share_experts() -> None:
    h100 = find_device("h100")
    found = [str(each) for each in layouts(request(devices=32), h100)]
    assert found == ["fsdp=32", "ddp=32", "hsdp=4x8", "fsdp=16,tp=2,sp", "fsdp=8,tp=4,sp",
                     "fsdp=4,tp=8,sp"]  # fmt: skip
    assert [str(each) for each in layouts(request(devices=1), h100)] == ["fsdp=1"]
    experts = layouts(PlanRequest(target="moonlight-nano", devices=4), h100)
    assert [str(each) for each in experts][-2:] == ["fsdp=4,ep=2", "fsdp=4,ep=4"]


def test_a_layout_that_cannot_share_the_batch_is_left_out() -> None:
    facts = suggest(request(overrides=[*PICO, "train.batch_tokens=64"], devices=2))
    assert [row["layout"] for row in facts["choices"]] == ["tp=2,sp"]
    assert {row["layout"] for row in facts["left_out"]} == {"fsdp=2", "ddp=2"}
    assert "cannot share" in facts["left_out"][0]["reason"]
    assert facts["config"]["parallel"] == {"data": "fsdp", "tensor": 2, "sequence": True}
    with pytest.raises(ConfigError, match=r"fsdp=3.*cannot share"):
        suggest(request(devices=3))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"target": "llama-pico", "overrides": []}, "takes a recipe"),
        ({"layout": "fsdp=4"}, "--layout"),
        ({"micro_batch": 64}, "--micro-batch"),
        ({"overrides": [*PICO, "train.compile=true"]}, "train.compile"),
        ({"overrides": ["parallel.tensor=2"]}, "parallel.tensor"),
        ({"devices": 0}, "--devices 0"),
        ({"device": "h10"}, "h100"),
    ],
)
def test_what_leaves_no_choice_is_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        suggest(request(**keys))


def test_the_text_lists_choices_in_comments() -> None:
    facts = suggest(request(devices=1))
    text = suggestion_text(facts)
    assert yaml.safe_load(text) == facts["config"]
    assert "# Train with: muonscale train" in text
