"""Multipliers against tables that were worked out by hand: a width 4 times the base."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from muonscale import Muon
from muonscale.errors import ConfigError
from muonscale.optim.parameters.roles import Role
from muonscale.transfer.multipliers import Multipliers, UpdateRule, fold_in, multipliers

SQUARE = (1024, 1024), (256, 256)
WIDER = (4096, 1024), (1024, 256)
LATENT = (64, 1024), (64, 256)  # to a side that does not grow
RAISED = (1024, 64), (256, 64)  # from one
TABLE = (5000, 1024), (5000, 256)  # also a head
GAIN = (1024, 1), (256, 1)
ADAMW = UpdateRule(rule="adamw")


def muon(**options: object) -> UpdateRule:
    return UpdateRule(rule="muon", **options)


# role, shapes, rule: init, lr, decay, eps under the spectral convention
SPECTRAL = [
    (Role.HIDDEN, SQUARE, muon(scale="spectral"), (1 / 2, 1, 1, 1)),
    (Role.HIDDEN, WIDER, muon(scale="spectral"), (1 / 2, 1, 1, 1)),
    (Role.HIDDEN, LATENT, muon(scale="spectral"), (1 / 4, 1, 1, 1)),
    (Role.HIDDEN, RAISED, muon(scale="spectral"), (1, 1, 1, 1)),
    (Role.ROUTER, LATENT, muon(scale="spectral"), (1 / 4, 1, 1, 1)),
    (Role.HIDDEN, SQUARE, muon(scale="rms"), (1 / 2, 1 / 2, 2, 1)),
    (Role.HIDDEN, WIDER, muon(scale="rms_exact"), (1 / 2, 1 / 2, 2, 1)),
    (Role.ROUTER, LATENT, muon(scale="rms"), (1 / 4, 1 / 4, 4, 1)),  # 1/2 for out/in, 1/2 for rms
    (Role.HIDDEN, RAISED, muon(scale="rms"), (1, 1, 1, 1)),  # 2 for out/in, 1/2 for rms
    (Role.HIDDEN, SQUARE, muon(scale="keller"), (1 / 2, 1, 1, 1)),
    (Role.ROUTER, LATENT, muon(scale="keller"), (1 / 4, 1 / 2, 2, 1)),
    (Role.HIDDEN, SQUARE, muon(scale="none"), (1 / 2, 1, 1, 1)),
    (Role.ROUTER, LATENT, muon(scale="none"), (1 / 4, 1 / 2, 2, 1)),
    (Role.HIDDEN, RAISED, muon(scale="none"), (1, 2, 1 / 2, 1)),
    (Role.HIDDEN, SQUARE, muon(scale=lambda out, in_: out), (1 / 2, 1 / 4, 4, 1)),
    (Role.HIDDEN, SQUARE, muon(scale="nvidia:spectral"), (1 / 2, 1 / 2, 2, 1)),
    (Role.HIDDEN, SQUARE, muon(scale="rms", decay="independent"), (1 / 2, 1 / 2, 1, 1)),
    (Role.HEAD, TABLE, muon(scale="spectral"), (1 / 4, 1, 1, 1)),
    (Role.EMBEDDING, TABLE, muon(scale="rms"), (1, 1, 1, 1)),
    (Role.EMBEDDING, TABLE, muon(scale="spectral"), (1, 2, 1 / 2, 1)),
    (Role.HIDDEN, SQUARE, ADAMW, (1 / 2, 1 / 4, 4, 1 / 4)),
    (Role.HIDDEN, RAISED, ADAMW, (1, 1, 1, 1 / 4)),
    (Role.HEAD, TABLE, ADAMW, (1 / 4, 1 / 4, 4, 1)),
    (Role.ROUTER, LATENT, ADAMW, (1 / 4, 1 / 4, 4, 1)),
    (Role.EMBEDDING, TABLE, ADAMW, (1, 1, 1, 1 / 4)),
    (Role.NORM, GAIN, ADAMW, (1, 1, 1, 1 / 4)),
    (Role.CONVOLUTION, ((1024, 4), (256, 4)), ADAMW, (1, 1, 1, 1 / 4)),
]
ADAM_TABLE = [
    (Role.HIDDEN, SQUARE, muon(scale="rms"), (1 / 2, 1 / 4, 1, 1)),
    (Role.HIDDEN, SQUARE, muon(scale="spectral"), (1 / 2, 1 / 2, 1 / 2, 1)),
    (Role.HIDDEN, RAISED, muon(scale="rms"), (1, 1, 1, 1)),
    (Role.ROUTER, LATENT, muon(scale="rms"), (1 / 4, 1 / 4, 1, 1)),
    (Role.HIDDEN, SQUARE, muon(scale="rms", decay="independent"), (1 / 2, 1 / 4, 1 / 4, 1)),
    (Role.HIDDEN, SQUARE, ADAMW, (1 / 2, 1 / 4, 1, 1)),
    (Role.HEAD, TABLE, ADAMW, (1 / 4, 1 / 4, 1, 1)),
    (Role.EMBEDDING, TABLE, ADAMW, (1, 1, 1, 1)),
    (Role.NORM, GAIN, ADAMW, (1, 1, 1, 1)),
]


def check(convention, rows) -> None:
    for role, (shape, base), rule, expected in rows:
        found = multipliers(role, shape, base, rule, convention)
        init, lr, weight_decay, eps = expected
        said = Multipliers(init=init, lr=lr, weight_decay=weight_decay, eps=eps)
        assert found == said, (role, shape, rule)


def test_the_spectral_table() -> None:
    check("spectral", SPECTRAL)


def test_the_table_of_adam() -> None:
    check("adam_table", ADAM_TABLE)


def test_everything_is_one_at_the_base_and_by_the_standard() -> None:
    for role, (shape, base), rule, _ in [*SPECTRAL, *ADAM_TABLE]:
        for convention in ("spectral", "adam_table", "standard"):
            for odd in (shape, base, (shape[0] + 3, shape[1])):
                assert multipliers(role, odd, odd, rule, convention) == Multipliers()
        assert multipliers(role, shape, base, rule, "standard") == Multipliers()


SCALES = ["rms", "rms_exact", "spectral", "keller", "none"]
POST_NORMS = [None, "row", "col", "col_row", "row_col", "normuon", "frobenius"]
SHAPES = [
    ((96, 96), (32, 32)),
    ((192, 96), (64, 32)),
    ((96, 192), (32, 64)),
    ((16, 144), (16, 36)),
    ((144, 16), (36, 16)),
    ((40, 80), (40, 20)),
]


@pytest.mark.parametrize(("convention", "lr"), [("spectral", 1.0), ("adam_table", 0.5)])
def test_a_kept_norm_makes_updates_grow_as_the_weight_does(convention, lr: float) -> None:
    """At four times the width the weight has half the RMS, so the update has, too."""
    rule = UpdateRule(constraint="weight_norm")
    assert multipliers(Role.HIDDEN, (64, 64), (16, 16), rule, convention).lr == lr
    assert multipliers(Role.HIDDEN, (64, 64), (16, 16), UpdateRule(), convention).lr != 2 * lr
    braked = UpdateRule(constraint="radial_brake")
    both = (
        multipliers(Role.HIDDEN, (64, 64), (16, 16), r, convention) for r in (braked, UpdateRule())
    )
    assert len(set(both)) == 1


def a_step(shape: tuple[int, int], scale: str, post_norm: str | None, lr: float) -> torch.Tensor:
    """Return what one step of Muon takes from a matrix, for a full-rank gradient."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(shape))
    weight.grad = torch.randn(shape)
    coefficients = {"ns_coefficients": "polar_express", "ns_steps": 8}
    options = {"scale": scale, "post_norm": post_norm, "weight_decay": 0.0, **coefficients}
    Muon([weight], lr=lr, **options).step()
    return weight.detach()


@pytest.mark.parametrize("post_norm", POST_NORMS)
@pytest.mark.parametrize("scale", SCALES)
def test_real_steps_of_two_widths_follow_the_rule(scale: str, post_norm: str | None) -> None:
    """Nothing is applied twice and nothing is forgotten, whatever the optimizer multiplies by itself."""
    for shape, base in SHAPES:
        rule = muon(scale=scale, post_norm=post_norm)
        r_out, r_in = shape[0] / base[0], shape[1] / base[1]
        for convention in ("spectral", "adam_table"):
            lr = multipliers(Role.HIDDEN, shape, base, rule, convention).lr
            wide, narrow = a_step(shape, scale, post_norm, lr), a_step(base, scale, post_norm, 1.0)
            if convention == "spectral":
                found = torch.linalg.matrix_norm(wide, 2) / torch.linalg.matrix_norm(narrow, 2)
                expected = math.sqrt(r_out / r_in)
            else:
                found = wide.square().mean().sqrt() / narrow.square().mean().sqrt()
                expected = 1 / r_in
            # Rows of unit length spread the singular values, by chance and more in small matrices.
            loose = convention == "spectral" and post_norm not in (None, "frobenius")
            assert float(found) == pytest.approx(expected, rel=0.2 if loose else 0.02), (
                shape,
                convention,
            )


def test_a_fold_scales_init_and_step_and_keeps_the_decay() -> None:
    found = Multipliers(init=0.5, lr=0.25, weight_decay=2.0, eps=0.5)
    assert fold_in(found, 0.5, ADAMW, offset=False) == Multipliers(
        init=0.25, lr=0.125, weight_decay=4.0, eps=1.0
    )
    assert fold_in(found, 0.5, muon(), offset=False).eps == 0.5
    independent = UpdateRule(rule="adamw", decay="independent")
    assert fold_in(found, 0.5, independent, offset=False).weight_decay == 2.0
    gain = fold_in(Multipliers(), 0.25, ADAMW, offset=True)
    assert gain == Multipliers(init=0.25, shift=-0.75, lr=0.25, weight_decay=None, eps=4.0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((Role.HIDDEN, (8, 8), (4, 4), muon(), "spectrum"), "'spectrum'.*spectral"),
        ((Role.EMBEDDING, (9, 8), (8, 4), ADAMW, "spectral"), "9 .*8 "),
        ((Role.HIDDEN, (0, 8), (4, 4), muon(), "spectral"), r"\(0, 8\)"),
        ((Role.HIDDEN, (8, 8), (4, 4), muon(scale=lambda o, i: 0.0), "spectral"), "above 0"),
    ],
)
def test_what_is_refused(arguments: tuple, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        multipliers(*arguments)


def test_a_rule_that_there_is_not() -> None:
    for options in ({"scale": "spectrl"}, {"post_norm": "rows"}, {"decay": "copled"}):
        with pytest.raises(ConfigError, match="did you mean"):
            UpdateRule(**options)
