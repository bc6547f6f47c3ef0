"""The loss of a text and its standard error."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor

from muonscale.lab.parallel.processes import Processes
from muonscale.lab.parallel.text_loss import losses_on, standard_error


def test_documents_of_one_row_each_have_the_textbook_error():
    means = np.array([2.0, 3.0, 2.5, 4.5])
    error = standard_error(16 * means, np.full(4, 16.0), np.arange(4))
    assert error == pytest.approx(means.std(ddof=1) / 2)


def draw(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return 60 documents of one to nine rows; the rows of a document are alike."""
    generator = np.random.default_rng(seed)
    documents = np.repeat(np.arange(60), generator.integers(1, 10, 60))
    targets = generator.integers(8, 64, len(documents)).astype(float)
    means = 3 + 0.5 * generator.standard_normal(60)[documents]
    means += 0.1 * generator.standard_normal(len(documents))
    return targets * means, targets, documents


def test_the_error_is_the_spread_of_the_loss_over_draws_of_documents():
    errors = [standard_error(*draw(seed)) for seed in range(300)]
    losses = [summed.sum() / targets.sum() for summed, targets, _ in map(draw, range(300))]
    assert np.mean(errors) == pytest.approx(np.std(losses), rel=0.15)  # type: ignore[arg-type]


def test_one_document_has_no_error():
    assert standard_error(np.array([20.0, 30.0]), np.array([10.0, 10.0]), np.zeros(2, int)) is None


class Bigram:
    """A model whose logits depend on the last token alone."""

    def __init__(self) -> None:
        self.table_VV = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)) * 3

    def evaluation(self) -> nullcontext[None]:
        return nullcontext()

    def logits(self, ids_BL: Tensor, positions_BL: Tensor | None) -> Tensor:
        return self.table_VV[ids_BL]


@pytest.mark.parametrize("batch_rows", [1, 3, 20])
def test_rows_count_for_the_document_that_they_begin_in(batch_rows: int):
    # Documents of 8, 2, 14 and 16 tokens, each after a 0, in rows of 4: 0-1, 2, 3-5, 6-9.
    tokens = np.random.default_rng(0).integers(1, 8, 41)
    tokens[[0, 8, 10, 24]] = 0
    rows = np.stack([tokens[at : at + 5] for at in range(0, 40, 4)])
    batches = [rows[at : at + batch_rows] for at in range(0, 10, batch_rows)]
    model = Bigram()
    found = losses_on(model, {"a": batches}, Processes(), document_start=0)  # type: ignore[arg-type]
    assert found is not None
    logp_BLV = model.table_VV[torch.from_numpy(rows[:, :-1])].log_softmax(-1)
    loss_B = -logp_BLV.gather(2, torch.from_numpy(rows[:, 1:, None])).sum((1, 2)).double().numpy()
    documents = np.array([0, 0, 1, 2, 2, 2, 3, 3, 3, 3])
    assert found["a"].loss == pytest.approx(loss_B.sum() / 40, rel=1e-5)
    error = standard_error(loss_B, np.full(10, 4.0), documents)
    assert found["a"].standard_error == pytest.approx(error, rel=1e-4)
    plain = losses_on(model, {"a": batches}, Processes())  # type: ignore[arg-type]
    assert plain is not None and plain["a"].standard_error is None
