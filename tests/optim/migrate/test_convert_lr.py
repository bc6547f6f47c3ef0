from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from muonscale import Muon
from muonscale.errors import ConfigError
from muonscale.optim.migrate.convert_lr import conversion_table, convert_lr

SHAPES = [(1024, 1024), (4096, 1024), (1024, 4096), (4096, 14336)]


def test_it_gives_the_known_factors_from_keller_to_moonlight() -> None:
    """6.4, 6.4, 12.8 and 23.9 times the update, so the learning rate goes down by as much."""
    factors = [1 / convert_lr(1.0, "keller", "rms", shape) for shape in SHAPES]
    assert factors == pytest.approx([6.4, 6.4, 12.8, 23.946], rel=1e-4)


@pytest.mark.parametrize("from_", ["keller", "spectral", "nvidia:spectral", "none"])
@pytest.mark.parametrize("to", ["rms", "keller", "match_rms_adamw", lambda out, in_: out + in_])
@pytest.mark.parametrize("shape", [(6, 24), (24, 6)])
def test_a_converted_learning_rate_takes_the_same_step(from_, to, shape) -> None:
    torch.manual_seed(0)
    G = torch.randn(shape)
    results = []
    for scale, lr in ((from_, 0.02), (to, convert_lr(0.02, from_, to, shape))):
        W = nn.Parameter(torch.zeros(shape))
        W.grad = G
        Muon([W], lr=lr, scale=scale, ns_dtype="float32").step()
        results.append(W.detach())
    torch.testing.assert_close(results[0], results[1])


def test_converting_there_and_back_is_nothing() -> None:
    for shape in SHAPES:
        there = convert_lr(0.3, "spectral", "rms", shape, rms=0.5)
        assert convert_lr(there, "rms", "spectral", shape, rms=0.5) == pytest.approx(0.3)


def test_the_table_counts_shapes_and_finds_the_best_single_number() -> None:
    shapes = [SHAPES[0]] * 3 + [SHAPES[2]]
    table = conversion_table(shapes, "keller", "rms")
    assert [(row.shape, row.count) for row in table.rows] == [(SHAPES[0], 3), (SHAPES[2], 1)]
    errors = {
        guess: sum(row.count * (math.log(row.factor) - math.log(guess)) ** 2 for row in table.rows)
        for guess in (table.best * 0.99, table.best, table.best * 1.01)
    }
    assert min(errors, key=lambda guess: errors[guess]) == table.best
    assert table.spread == pytest.approx(2.0)
    exact = conversion_table(SHAPES, "dion:spectral_norm", "spectral")
    assert (exact.best, exact.spread) == pytest.approx((1.0, 1.0))


def test_what_cannot_be_converted_is_said() -> None:
    with pytest.raises(ConfigError, match="0 shapes"):
        conversion_table([], "keller", "rms")
    with pytest.raises(ConfigError, match=r"'rms'.*0\.0.*\(4, 4\)"):
        convert_lr(1.0, "keller", "rms", (4, 4), rms=0.0)
    with pytest.raises(ConfigError, match="lambda"):
        conversion_table([(4, 4)], lambda out, in_: 0.0, "rms")
    with pytest.raises(ConfigError, match="kellar"):
        convert_lr(1.0, "kellar", "rms", (4, 4))
