from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from muonscale.errors import ConfigError
from muonscale.optim.newton_schulz.coefficients import (
    SCHEDULES,
    Coefficients,
    resolve,
)
from muonscale.optim.newton_schulz.polar_express import polar_express

Triples = Sequence[tuple[float, float, float]]


def mapped(triples: Triples, sigmas: Tensor | float) -> Tensor:
    values = torch.as_tensor(sigmas, dtype=torch.float64)
    for a, b, c in triples:
        values = a * values + b * values**3 + c * values**5
    return values


def between(low: float, high: float) -> Tensor:
    return torch.logspace(math.log10(low), math.log10(high), 20001, dtype=torch.float64)


# What five steps (or as many as given) make of a singular value: slope at 0, the values at 1e-4,
# 1e-3 and 1e-2, the range on [0.01, 1], the value at 1.
GOLDEN: list[tuple[str, Triples, float, tuple[float, ...], tuple[float, float], float]] = [
    (
        "jordan",
        resolve("jordan", 5).triples,
        484.9,
        (0.0485, 0.4705, 0.6989),
        (0.6818, 1.1344),
        0.6964,
    ),
    (
        "jordan x10",
        resolve("jordan", 10).triples,
        2.351e5,
        (0.7547, 0.9881, 1.1219),
        (0.6818, 1.1344),
        1.1253,
    ),
    ("you5", resolve("you5", 5).triples, 492.7, (0.0493, 0.4750, 1.0180), (0.9778, 1.0318), 0.9783),
    (
        "you6",
        resolve("you6", 6).triples,
        1137.5,
        (0.1134, 0.8663, 0.9988),
        (0.9956, 0.9993),
        0.9984,
    ),
    (
        "polar express without safety",
        polar_express(5),
        1026.1,
        (0.1024, 0.8764, 1.1034),
        (0.8764, 1.1236),
        1.1236,
    ),
    (
        "polar_express",
        resolve("polar_express", 5).triples,
        976.3,
        (0.0975, 0.8462, 1.0660),
        (0.8703, 1.1236),
        1.0288,
    ),
    (
        "polar_express_nanochat",
        resolve("polar_express_nanochat", 5).triples,
        989.5,
        (0.0988, 0.8589, 1.0271),
        (0.8589, 1.1411),
        0.8591,
    ),
    (
        "cans",
        resolve("cans", 5).triples,
        1048.9,
        (0.1047, 0.8865, 1.1132),
        (0.8844, 1.1198),
        1.0051,
    ),
    (
        "deepseek_v4",
        resolve("deepseek_v4", 10).triples,
        79263,
        (1.0020, 1.0, 1.0),
        (1.0, 1.0005),
        1.0,
    ),
    (
        "cubic5",
        resolve("cubic5", 5).triples,
        119.3,
        (0.0119, 0.1191, 1.0216),
        (0.7741, 1.3000),
        0.7741,
    ),
]


@pytest.mark.parametrize(
    ("triples", "slope", "values", "ends", "at_one"),
    [row[1:] for row in GOLDEN],
    ids=[row[0] for row in GOLDEN],
)
def test_a_schedule_maps_singular_values_as_computed_elsewhere(
    triples: Triples,
    slope: float,
    values: tuple[float, ...],
    ends: tuple[float, float],
    at_one: float,
) -> None:
    # The slopes were given to four digits or more, the rest to four decimals.
    assert math.prod(a for a, _, _ in triples) == pytest.approx(slope, rel=4e-4)
    found = mapped(triples, torch.tensor([1e-4, 1e-3, 1e-2]))
    assert found.tolist() == pytest.approx(list(values), abs=6e-5)
    image = mapped(triples, between(0.01, 1))
    assert (float(image.min()), float(image.max())) == pytest.approx(ends, abs=6e-5)
    assert float(mapped(triples, 1.0)) == pytest.approx(at_one, abs=6e-5)


# Images of [0.05, 1] and of [1e-3, 1], from another survey of the same tables.
@pytest.mark.parametrize(
    ("name", "steps", "upper", "whole"),
    [
        ("gram_ns", 5, (0.846, 1.124), (0.729, 1.124)),
        ("jordan", 5, (0.682, 1.134), (0.471, 1.202)),
        ("you5", 5, (0.978, 1.032), (0.475, 1.145)),
        ("cubic5", 5, (0.774, 1.300), (0.119, 1.300)),
        ("polar_express_nanochat", 5, (0.859, 1.141), (0.859, 1.141)),
        ("deepseek_v4", 10, (1.000, 1.001), (1.000, 1.001)),
        # Turbo-Muon's rows, after the preconditioner: our own values, frozen.
        ("aol", 4, (-1.084, 1.084), (-1.084, 1.084)),
        ("aol_flash", 4, (0.941, 1.050), (0.147, 1.050)),
    ],
)
def test_images_of_intervals(
    name: str, steps: int, upper: tuple[float, float], whole: tuple[float, float]
) -> None:
    triples = resolve(name, steps).triples
    for low, expected in ((0.05, upper), (1e-3, whole)):
        image = mapped(triples, between(low, 1))
        assert (float(image.min()), float(image.max())) == pytest.approx(expected, abs=6e-4)


def test_jordan_reaches_its_highest_value_below_one_hundredth() -> None:
    image = mapped(resolve("jordan", 5).triples, between(0.003, 1))
    assert float(image.max()) == pytest.approx(1.2024, abs=6e-5)


def test_nvidias_aol_row_turns_the_largest_singular_values_round() -> None:
    # 4.0098 - 7.0585 s^2 + 2.4635 s^4 has a zero at s = 0.884.
    triples = resolve("aol", 4).triples
    assert float(mapped(triples, 0.87)) > 0.9
    assert float(mapped(triples, 0.90)) < 0
    assert float(mapped(triples, 1.0)) == pytest.approx(-0.9935, abs=6e-5)
    assert min(mapped(resolve("aol_flash", 4).triples, between(0.01, 1))) > 0.9


def test_only_the_last_published_row_is_without_the_safety_factor() -> None:
    raw = polar_express(8)
    for (a, b, c), (safe_a, safe_b, safe_c) in zip(
        raw[:7], SCHEDULES["polar_express"].triples[:7], strict=True
    ):
        assert (safe_a, safe_b, safe_c) == pytest.approx((a / 1.01, b / 1.01**3, c / 1.01**5))
    assert SCHEDULES["polar_express"].triples[7] == (1.875, -1.25, 0.375)


def test_every_schedule_names_its_source() -> None:
    assert all(len(row.source) > 20 and row.triples for row in SCHEDULES.values())


def test_a_schedule_knows_its_normalization() -> None:
    assert resolve("polar_express", 5).margin == resolve("polar_express_nanochat", 5).margin == 1.01
    found = {name: resolve(name, 10).normalization for name in SCHEDULES}
    assert {name for name, kind in found.items() if kind == "aol"} == {"aol", "aol_flash"}
    assert set(found.values()) == {"aol", "frobenius"}


def test_a_name_can_have_another_normalization() -> None:
    plain = resolve("polar_express", 5)
    assert resolve("polar_express+schatten4", 5) == replace(plain, normalization="schatten4")
    for wrong in ("you5+schatten", "you5+", "+aol"):
        with pytest.raises(ConfigError, match="called"):
            resolve(wrong, 5)


def test_a_list_is_used_in_order_and_its_last_triple_repeated() -> None:
    first, last = (1.0, 2.0, 3.0), (4.0, 5.0, 6.0)
    assert resolve([first, last], 4).triples == (first, last, last, last)
    assert resolve([first, last], 1).triples == (first,)
    assert resolve(first, 2).triples == (first, first)
    whole = Coefficients(triples=(first, last), margin=1.5, normalization="schatten4")
    assert resolve(whole, 3) == replace(whole, triples=(first, last, last))


def test_coefficients_can_be_keys_and_do_not_depend_on_how_they_were_given() -> None:
    given = [[3.4445, -4.7750, 2.0315]]
    assert len({resolve("jordan", 5), resolve(given, 5), resolve(tuple(given[0]), 5)}) == 1
    assert len({resolve("jordan", 5), resolve("jordan", 4), resolve("you5", 5)}) == 3


@pytest.mark.parametrize("wrong", ["jordon", [], [(1.0, 2.0)], (1.0, 2.0), ["abc"], [5.0]])
def test_unusable_coefficients_are_refused(wrong: object) -> None:
    with pytest.raises(ConfigError):
        resolve(wrong, 5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong", [{"normalization": "frobenious"}, {"margin": 0.5}, {"restarts": (0,)}]
)
def test_unusable_parts_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        Coefficients(triples=((1.0, 0.0, 0.0),), **wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="has 0 triples"):
        resolve(Coefficients(triples=()), 5)


@pytest.mark.parametrize(
    ("name", "meant"), [("jordon", "jordan"), ("polar", "polar_express"), ("deepseek", "deepseek")]
)
def test_a_misspelt_name_is_answered_with_the_right_one(name: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=meant):
        resolve(name, 5)


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(ConfigError, match="ns_steps is 0"):
        resolve("jordan", 0)
    for name, least in [("deepseek_v4", 10), ("you6", 6), ("aol", 4)]:
        with pytest.raises(ConfigError, match=f"ns_steps is {least - 1}.*{least} steps"):
            resolve(name, least - 1)
        assert resolve(name, least).steps == least
