from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from muonscale.lab.files import drop_nonfinite
from muonscale.lab.fits.steps_to_loss import StepsToLoss
from muonscale.lab.report.page import Page, Table, Text, Verdict
from muonscale.lab.report.write import write_page
from muonscale.lab.studies.frontier.analysis import Steps, analyze_frontier
from muonscale.lab.studies.frontier.config import FrontierSection
from muonscale.lab.studies.frontier.report import report_frontier
from muonscale.lab.studies.study import Outcome
from tests.lab.studies.frontier.test_step_time import timed

LENGTH = 32
BATCHES = [64, 128, 256, 512, 1024, 2048]
DEVICES = [1, 2, 4, 8]


@pytest.fixture
def outcomes(tmp_path: Path) -> dict[str, Outcome]:
    """Return runs with passes of 3 ms + 0.02 ms per token, and 5 ms (AdamW: 1 ms) of the optimizer."""
    runs = [
        timed(tmp_path, variant, batch, [3 + 0.02 * batch + own], own)
        for variant, own in (("adamw", 1.0), ("muon", 5.0))
        for batch in (64, 512)
    ]
    return {o.run.id: o for o in runs}


def steps(factor: float, smallest: int = 0, largest: int = 6, freedom: int = 50) -> StepsToLoss:
    """Return factor * (100 + 25,600 / B) steps: the fastest batches are inside on 1 to 8 devices."""
    batches = np.array(BATCHES[smallest:largest], np.float64)
    return StepsToLoss(
        batches=batches,
        log_steps=np.log(factor * (100 + 25_600 / batches)),
        error=np.full(len(batches), 0.01 if freedom else math.nan),
        freedom=freedom,
    )


def both(muon: float, **keys: int) -> dict[str, StepsToLoss]:
    return {"muon": steps(muon, **keys), "adamw": steps(1.0, **keys)}


def found_of(
    targets: Steps, outcomes: dict[str, Outcome], baseline: str | None = None
) -> dict[str, Any]:
    section = FrontierSection(devices=DEVICES)
    found = drop_nonfinite(analyze_frontier(section, targets, outcomes, LENGTH, baseline=baseline))
    json.dumps(found, allow_nan=False)
    return found


def blocks(found: dict[str, Any], tmp_path: Path) -> list[Any]:
    section = report_frontier(found)
    write_page(Page(title="t", summary="s", sections=(section,)), tmp_path / "report")
    return list(section.blocks)


def test_the_points_of_a_curve(outcomes: dict[str, Outcome]) -> None:
    found = found_of({3.5: both(0.6)}, outcomes)
    muon, adamw = found["curves"]
    assert (muon["optimizer"], muon["target"]) == ("muon", 3.5)
    for curve, factor, own in ((muon, 0.6, 5), (adamw, 1.0, 1)):
        for n, point in zip(DEVICES, curve["points"], strict=True):
            times = {
                b: factor * (100 + 25_600 / b) * (3 + 0.02 * b / n + own / n) / 1000
                for b in BATCHES
                if b >= n * LENGTH
            }
            best = min(times, key=lambda b: times[b])
            assert (point["devices"], point["batch"]) == (n, best)
            assert point["seconds"] == pytest.approx(times[best])
            assert point["device_seconds"] == pytest.approx(n * times[best])
            assert point["low"] < point["seconds"] < point["high"] < 1.1 * point["low"]
            assert point["efficient"] and point["edge"] is None


def test_a_curve_inside_another_is_a_claim_that_holds(
    outcomes: dict[str, Outcome], tmp_path: Path
) -> None:
    found = found_of({3.5: both(0.6), 3.25: both(0.8)}, outcomes)
    assert [v["inside"] for v in found["verdicts"]] == [True, None]
    first = found["verdicts"][0]
    assert (first["optimizer"], first["baseline"]) == ("muon", "adamw")
    assert re.fullmatch("muon is faster .* 4 .* in 100.0% of draws", first["why"])
    own, other = ([p["seconds"] for p in curve["points"]] for curve in found["curves"][:2])
    ratios = [r["ratio"] for r in first["ratios"]]
    assert ratios == pytest.approx([a / b for a, b in zip(own, other, strict=True)])
    assert min(ratios) < first["mean"]["ratio"] < max(ratios)
    said = blocks(found, tmp_path)
    verdicts = [b for b in said if isinstance(b, Verdict)]
    assert [v.passed for v in verdicts] == [True, None]
    assert verdicts[0].text.startswith("to 3.5 nats muon's curve")
    tables = {b.name: b for b in said if isinstance(b, Table)}
    assert len(tables["frontier-points"].rows) == 2 * 2 * 4
    assert len(tables["frontier-ratios"].rows) == 2 * (4 + 1)
    assert {row[0] for row in tables["frontier-assumptions"].rows} >= {
        "passes of muon",
        "optimizer of adamw",
        "data parallelism",
    }


def test_a_slower_optimizer_is_said_to_lie_outside(outcomes: dict[str, Outcome]) -> None:
    found = found_of({3.5: both(1.1)}, outcomes)["verdicts"][0]
    assert found["inside"] is False
    assert found["why"].startswith("adamw is faster at all of 4 ")


def test_the_baseline_can_be_chosen(outcomes: dict[str, Outcome]) -> None:
    (verdict,) = found_of({3.5: both(0.6)}, outcomes, "muon")["verdicts"]
    assert (verdict["optimizer"], verdict["baseline"]) == ("adamw", "muon")
    assert verdict["inside"] is False


def test_upper_bounds_are_flagged_and_not_judged(
    outcomes: dict[str, Outcome], tmp_path: Path
) -> None:
    targets = {3.5: {"muon": steps(0.6), "adamw": steps(1.0, largest=4)}}
    found = found_of(targets, outcomes)
    adamw = found["curves"][1]["points"]
    # Its best batches are near 226, 299, 408 and 566 tokens; the largest that reached the loss is 512.
    assert [p["edge"] for p in adamw] == [None, None, "high", "high"]
    verdict = found["verdicts"][0]
    assert [r["judged"] for r in verdict["ratios"]] == [True, True, False, False]
    assert re.search("at 2 more .* adamw is only an upper bound", verdict["why"])
    table = next(
        b for b in blocks(found, tmp_path) if isinstance(b, Table) and b.name == "frontier-points"
    )
    assert sum("upper bound: largest batch" in row[-1] for row in table.rows) == 2
    never = found_of({3.5: {"muon": steps(0.6), "adamw": steps(1.0, largest=1)}}, outcomes)
    assert re.search("every .* adamw is only an upper bound", never["verdicts"][0]["why"])


def test_one_seed_gives_curves_without_bands(outcomes: dict[str, Outcome], tmp_path: Path) -> None:
    found = found_of({3.5: both(0.6, freedom=0)}, outcomes)
    assert found["verdicts"][0]["inside"] is None
    assert "give two seeds" in found["verdicts"][0]["why"]
    assert all(p["low"] is None for curve in found["curves"] for p in curve["points"])
    assert blocks(found, tmp_path)


def test_an_unfinished_study_says_what_is_missing(
    outcomes: dict[str, Outcome], tmp_path: Path
) -> None:
    assert found_of({}, {})["why"] == "no run has reached a target loss"
    lost = StepsToLoss(
        batches=np.array([64.0]), log_steps=np.array([np.inf]), error=np.array([np.nan]), freedom=0
    )
    assert found_of({3.5: {"muon": lost}}, outcomes)["why"] == "no run has reached a target loss"
    found = found_of({3.5: both(0.6)}, {})
    assert "batch sizes, got 0" in found["why"]
    (said,) = blocks(found, tmp_path)
    assert isinstance(said, Text) and said.text.startswith("muon: ")
    alone = found_of({3.5: {"muon": steps(0.6)}}, outcomes)
    assert len(alone["curves"]) == 1 and alone["verdicts"] == []
    assert blocks(alone, tmp_path)


def test_a_target_that_the_baseline_did_not_reach_has_no_verdict(
    outcomes: dict[str, Outcome], tmp_path: Path
) -> None:
    found = found_of({3.5: both(0.6), 3.0: {"muon": steps(1.5)}}, outcomes)
    assert [(c["target"], c["optimizer"]) for c in found["curves"]] == [
        *[(3.5, "muon"), (3.5, "adamw")],
        (3.0, "muon"),
    ]
    assert [v["target"] for v in found["verdicts"]] == [3.5]
    assert blocks(found, tmp_path)


def test_a_stated_device_has_its_times_from_the_plan(outcomes: dict[str, Outcome]) -> None:
    section = FrontierSection(devices=[1, 2], throughput="h100")
    two = StepsToLoss(
        batches=np.array([64.0, 512.0]),
        log_steps=np.log([1000.0, 100.0]),
        error=np.full(2, 0.01),
        freedom=5,
    )
    found = analyze_frontier(section, {3.5: {"muon": two}}, outcomes, LENGTH)
    assert found["throughput"] == "h100"
    assert {"peak of a device", "MFU of the model"} <= {r["what"] for r in found["assumptions"]}
    assert all(0 < p["seconds"] < 1 for p in found["curves"][0]["points"])
    lost = analyze_frontier(section, {3.5: {"muon": two, "adamw": steps(1.0)}}, outcomes, LENGTH)
    assert lost["why"].startswith("no finished run of adamw has a batch of 128 tokens; finish one")
    assert lost["curves"] == lost["verdicts"] == []
