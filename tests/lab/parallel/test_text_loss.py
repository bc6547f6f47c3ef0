"""The loss of a text and its standard error."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from muonscale.lab.parallel.text_loss import row_moments, text_loss


def drawn(rows: int, seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return summed losses and targets of rows; rows with more targets are easier."""
    generator = np.random.default_rng(seed)
    targets = generator.integers(1, 64, rows)
    means = 3.0 - targets / 100 + 0.4 * generator.standard_normal(rows)
    return targets * means, targets


def test_rows_of_equal_length_have_the_textbook_error():
    means = np.array([2.0, 3.0, 2.5, 4.5])
    loss = text_loss(*row_moments(16 * means, np.full(4, 16)))
    assert (loss.loss, loss.targets) == (3.0, 64)
    assert loss.standard_error == pytest.approx(means.std(ddof=1) / 2)


def test_the_error_is_the_spread_of_the_loss_over_draws_of_rows():
    summed, targets = drawn(400)
    error = text_loss(*row_moments(summed, targets)).standard_error
    draws = [drawn(400, seed) for seed in range(1, 601)]
    spread = np.std([s.sum() / n.sum() for s, n in draws])
    assert error == pytest.approx(spread, rel=0.15)


def test_sums_of_parts_give_the_error_of_the_whole():
    summed, targets = drawn(50)
    parts = row_moments(summed[:20], targets[:20]) + row_moments(summed[20:], targets[20:])
    whole = text_loss(*row_moments(summed, targets))
    added = text_loss(*parts)
    assert added.loss == pytest.approx(whole.loss)
    assert added.standard_error == pytest.approx(whole.standard_error)


def test_one_row_has_no_error():
    assert text_loss(*row_moments(np.array([20.0]), np.array([10]))).standard_error is None
