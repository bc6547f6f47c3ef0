"""Steps against the code that the authors of a rule published.

Their code was run in float64 (Newton-Schulz included, its epsilons set to 0) on the matrices of
`matrix`, three steps at lr 0.05. The figures of the weights afterwards are frozen here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muonscale import Muon, preset
from muonscale.optim.newton_schulz.coefficients import resolve

SHAPES = ((6, 4), (4, 6), (5, 5))


def matrix(shape: tuple[int, int], seed: int) -> Tensor:
    """Return a full-rank matrix that needs no random numbers."""
    k = torch.arange(1, shape[0] * shape[1] + 1, dtype=torch.float64)
    return ((k * (seed + 0.5)).sin() + (k * k * 0.37 * (seed + 1)).cos()).view(shape)


def figures(W: Tensor) -> list[float]:
    """Return two elements, the sum, and the sum of squares."""
    return [float(x) for x in (W[0, 0], W[-1, -1], W.sum(), W.square().sum())]


MUON_EQ = {
    "row": [
        [1.355915335756531, 0.34311622323723434, 5.30335304936599, 26.154257302595155],
        [1.3511465758473697, 0.3318099082791188, 5.284745077691982, 26.16365759576113],
        [1.345733742737474, 0.303204662591384, 5.48441872200711, 26.24554987209416],
    ],
    "col": [
        [1.3532852559419377, 0.34980203368319224, 5.3260175420790565, 26.24073390310297],
        [1.3603186493997244, 0.3354009267418444, 5.271716626217456, 26.161342848668387],
        [1.3446281207760578, 0.3100097648523064, 5.476773108584922, 26.19926283661117],
    ],
    "row_col": [
        [1.3551362502372135, 0.35224963911745605, 5.327043437090804, 26.18403302717742],
        [1.361545310437007, 0.33516393636183633, 5.263094808027095, 26.177417263082525],
        [1.3436628441837002, 0.30803590741594544, 5.491509485632085, 26.213424122946112],
    ],
}
"""MaeChd/muon-eq 99b6c8b, optimizers/muon_variants/muoneq.py."""

MUON_H = [
    [1.2548223222916624, 0.44188100413018844, 5.378164777856181, 27.30885984140478],
    [1.2570944424032662, 0.32978070065799525, 5.1221728584165085, 27.30885984140477],
    [1.2197126679209682, 0.49025858309845266, 5.127987704836431, 27.381724967874078],
]
"""KellerJordan/modded-nanogpt f411b3d, track 3, 20260430_muonh/train_gpt_simple_muonh.py."""

RADIAL_BRAKE = [
    [1.179737150337116, 0.38996583046001554, 5.165533984504079, 25.43674384962224],
    [1.1841824001274825, 0.3181472773534552, 4.718457299206507, 25.504465607805347],
    [1.1549027848661202, 0.4784899657266821, 4.998468402554417, 25.46092703998557],
]
"""NVIDIA-NeMo/Emerging-Optimizers fd77292, RadialBrakeHook around a step of Muon."""

AURORA = [
    [1.3223880766039684, 0.3832259643117343, 5.334224753582949, 26.277497357530535],
    [1.3311719843469387, 0.3323017450194553, 5.22721895001865, 26.298834862111313],
    [1.3099442853479821, 0.3577810246911, 5.3706753671393725, 26.461959666591483],
]
"""tilde-research/aurora-release 3d79a5c, src/aurora.py."""

MUON_2 = [
    [1.3404940156710314, 0.404645244430589, 5.504671060999771, 26.36755140379575],
    [1.3535539619431503, 0.3667865057012001, 5.4081938469392, 26.8208302573243],
    [1.3597795156870653, 0.36284044421904865, 5.776257360032538, 26.49542770402784],
]
"""KellerJordan/modded-nanogpt f411b3d, track 3, 20260501_muonsq/train_gpt_simple_muonsq.py."""

ADAMUON = [
    [1.3645547314800532, 0.3659705160107498, 5.350793212296381, 26.081113673136148],
    [1.3650415969821696, 0.3592647570697798, 5.340354348341307, 26.052559103192632],
    [1.3590799826821252, 0.29419310087054734, 5.627748587270067, 26.103917040567747],
]
"""Chongjie-Si/AdaMuon, gpt2/models/optimizers/adamuon.py, of which only the epsilon of the second
moment is left."""

MUOWN = {
    0.0: [
        [1.3210328184949276, 0.3539343461844452, 5.104322199409424, 26.163734236818676],
        [1.3180271509537231, 0.34731935264408176, 5.0073518928389245, 25.571694118280103],
        [1.3167846890582893, 0.31489902793486724, 5.432518131089881, 25.900986274155557],
    ],
    0.1: [
        [1.3004919863892457, 0.3487988257585054, 5.024998887182374, 25.37547186340548],
        [1.297466305547245, 0.3422021494679707, 4.927851517739144, 24.797522512080498],
        [1.2919993273317492, 0.31025649574156206, 5.341859766050039, 25.118881689573463],
    ],
}
"""kcc-lion/muown 3bd0c05, optim/muown.py, by weight decay."""

DION_2 = {
    "dion2": [
        [1.3410772377547897, 0.3779870553207029, 5.184798612708362, 26.149539835182413],
        [1.3685930714868646, 0.33228404024705877, 5.210802790626554, 26.08858027792308],
        [1.357784547087068, 0.29618965622411175, 5.453945551339876, 26.09143538186908],
    ],
    "nordion2": [
        [1.3325532678677472, 0.38973481917532227, 5.212947318361892, 26.23627082790273],
        [1.3681395974220925, 0.3323661795695978, 5.24361026770457, 26.17086685649209],
        [1.357835769471746, 0.3036806330550932, 5.451685305132151, 26.122903781228267],
    ],
}
"""microsoft/dion 0a059a4, dion/dion2.py and dion/nordion2.py with select_dim=-2, fraction=0.4 and
weight_decay=0.1; Polar Express in float64 with its margin of 1.02."""

_DION_NS = replace(resolve("polar_express_nanochat", 5), margin=1.02)

CASES: list[tuple[dict[str, Any], list[list[float]]]] = [
    *((preset("muoneq") | {"pre_norm": name}, values) for name, values in MUON_EQ.items()),
    (preset("aurora"), AURORA),
    (preset("muon2") | {"weight_decay": 0.0}, MUON_2),
    (preset("adamuon"), ADAMUON),
    (preset("muonh"), MUON_H),
    *(
        (
            preset(n) | {"row_fraction": 0.4, "ns_coefficients": _DION_NS, "weight_decay": 0.1},
            values,
        )
        for n, values in DION_2.items()
    ),
    *((preset("muown") | {"weight_decay": wd}, values) for wd, values in MUOWN.items()),
    (
        {"nesterov": False, "scale": "nvidia:spectral", "constraint": "radial_brake"},
        RADIAL_BRAKE,
    ),
]


@pytest.mark.parametrize(("options", "expected"), CASES)
def test_three_steps_equal_those_of_the_authors_code(options, expected) -> None:
    for shape, values in zip(SHAPES, expected, strict=True):
        W = nn.Parameter(matrix(shape, 0))
        optimizer = Muon([W], lr=0.05, **options)
        for seed in (1, 2, 3):
            W.grad = matrix(shape, seed)
            optimizer.step()
        assert figures(W.detach()) == pytest.approx(values, rel=1e-12, abs=1e-12)
