"""What counts as rounding."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from muonscale.lab.verify.compare import LIMIT, LayoutComparison, compare
from muonscale.lab.verify.trajectory import GatheredTensors, Trajectory

ULP = torch.finfo(torch.float32).eps
NAMES = ("a", "b", "c")


def whole(values: dict[str, Tensor]) -> GatheredTensors:
    return GatheredTensors(values, dict.fromkeys(values, 0.0))


def trajectory(**weights: float) -> Trajectory:
    """Return one of three parameters whose weights and gradients are 1, but for those given."""
    values = {name: torch.tensor([1.0, weights.get(name, 1.0)]) for name in NAMES}
    moved = dict.fromkeys(NAMES, 1e-3)
    return Trajectory(
        [3.0, 2.0], whole(values), whole(dict(values)), moved, dict.fromkeys(NAMES, "g")
    )


def compared(other: Trajectory, *reordered: Trajectory) -> LayoutComparison:
    return compare(trajectory(), reordered or (trajectory(),), other, torch.float32)


def test_nothing_differs_from_itself() -> None:
    found = compared(trajectory())
    assert found.same and found.worst[1].ratio == 0


def test_a_difference_is_measured_in_units_of_reordered_runs() -> None:
    reordered = trajectory(a=1 + 1e-4), trajectory(a=1 - 2e-4)
    (row, *_) = compared(trajectory(a=1 + 8e-4), *reordered).weights
    assert row.reordered == pytest.approx(2e-4, rel=1e-3)
    assert row.ratio == pytest.approx(4, rel=1e-3)
    assert compared(trajectory(a=1 + 0.9 * LIMIT * 2e-4), *reordered).same
    assert not compared(trajectory(a=1 + 1.1 * LIMIT * 2e-4), *reordered).same


def test_a_parameter_that_happens_to_round_equally_has_the_rounding_of_its_group() -> None:
    other_order = trajectory(a=1 + 1e-4, b=1 + 1e-4)
    found = compared(trajectory(c=1 + 5e-4), other_order)
    assert found.weights[2].reordered == 0 and found.same
    alone = replace(other_order, groups={})
    one = replace(trajectory(), groups={name: name for name in NAMES})
    assert not compare(one, [alone], trajectory(c=1 + 5e-4), torch.float32).same


def test_one_parameter_without_a_certain_gradient_does_not_loosen_the_others() -> None:
    other_order = trajectory(a=2.0)
    assert compared(trajectory(a=3.0), other_order).same
    assert not compared(trajectory(b=1.01), other_order).same


def test_an_ulp_is_rounding_even_where_no_reordered_run_has_one() -> None:
    assert compared(trajectory(a=1 + 4 * ULP)).same
    assert not compared(trajectory(a=1 + 2 * LIMIT * ULP)).same


def test_ranks_that_hold_a_parameter_otherwise_are_a_difference() -> None:
    weights = trajectory().weights
    other = replace(
        trajectory(),
        weights=GatheredTensors(weights.values, {**weights.rank_differences, "b": 0.1}),
    )
    kind, row = compared(other).worst
    assert (kind, row.name, row.difference) == ("weights", "b", 0.1)


def test_a_loss_that_is_summed_otherwise_is_a_difference() -> None:
    found = compared(replace(trajectory(), losses=[3.0, 4.0]))
    assert not found.same
    assert found.worst[0] == "losses" and found.worst[1].name == "step 2"
    assert compared(replace(trajectory(), losses=[3.0 + 1e-6, 2.0])).same


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_no_rounding(value: float) -> None:
    assert not compared(trajectory(b=value)).same
    assert not compared(trajectory(b=value), trajectory(b=value)).same
    assert not compared(replace(trajectory(), losses=[value, 2.0])).same


def test_a_trajectory_comes_back_from_its_file(tmp_path: Path) -> None:
    trajectory(a=1.5).save(tmp_path / "t.pt")
    found = Trajectory.load(tmp_path / "t.pt")
    assert found.weights.values["a"].tolist() == [1.0, 1.5]
    assert found == replace(
        found, **{k: v for k, v in vars(trajectory()).items() if k in ("losses", "moved", "groups")}
    )
