"""Training on marked rows: the loss is the mean over all targets, however they are divided."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from muonscale.lab.config.run_length import Timeline
from muonscale.lab.config.sections import RoutingSection, ScheduleSection
from muonscale.lab.data.loss_mask import BEGIN, NO_TARGET, count_targets
from muonscale.lab.data.ngram import fit_ngrams
from muonscale.lab.parallel.forward import Parallelized
from muonscale.lab.training.router_balance import RouterBalance, plan_routing
from muonscale.lab.training.schedule import spans
from muonscale.lab.training.step import accumulate
from tests.lab.models.losses import loss_on_batches
from tests.optim.conftest import causal_lm

STAGES = spans(ScheduleSection(), Timeline.constant(10))
LENGTH = 13

# conversations of each row as (tokens, targets at their end); what is left is padding
ROWS = [[(6, 4), (5, 1)], [(14, 9)], [(3, 1)], [(4, 2), (4, 2), (4, 2)]]


def marked_rows(rows: list[list[tuple[int, int]]] = ROWS) -> np.ndarray:
    rng = np.random.default_rng(0)
    batch = np.full((len(rows), LENGTH + 1), NO_TARGET)
    for row, conversations in zip(batch, rows, strict=True):
        at = 0
        for tokens, targets in conversations:
            row[at : at + tokens] = rng.integers(1, 50, tokens)
            row[at : at + tokens - targets] |= NO_TARGET
            row[at] |= BEGIN
            at += tokens
        row[at : at + 1] |= BEGIN
    return batch


def by_hand(model: torch.nn.Module, batch: np.ndarray) -> Tensor:
    """Return the mean loss over the targets, each conversation alone, without marks or positions."""
    losses = []
    for row in batch:
        starts = [at for at, token in enumerate(row) if token & BEGIN]
        for start, end in zip(starts, [*starts[1:], len(row)], strict=True):
            part = row[start:end]
            ids = torch.from_numpy(part & 0xFFFFFFFF)
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
            losses += [
                F.cross_entropy(logits[at - 1], ids[at])
                for at in range(1, len(part))
                if not part[at] & NO_TARGET
            ]
    return torch.stack(losses).mean()


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3", "deepseek_v3"])
@pytest.mark.parametrize("micro", [4, 2, 1])
def test_gradients_are_those_of_the_mean_over_all_targets(kind: str, micro: int) -> None:
    model, batch = causal_lm(kind), marked_rows()
    model.eval()  # no dropout
    expected = by_hand(model, batch)
    expected.backward()
    wanted = gradients(model)
    model.zero_grad()
    routing = RouterBalance(model, plan_routing(model, RoutingSection(bias_rate=None), STAGES))  # type: ignore[arg-type]
    forward = Parallelized(model, model)  # type: ignore[arg-type]
    loss = accumulate(
        forward, routing, torch.from_numpy(batch), micro, targets=count_targets(batch)
    )
    assert float(loss) == pytest.approx(expected.item(), rel=1e-5)
    found = gradients(model)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_validation_loss_is_per_target() -> None:
    model, batch = causal_lm("llama"), marked_rows()
    loss, targets = loss_on_batches(model, [batch[:1], batch[1:]])  # type: ignore[arg-type]
    assert targets == count_targets(batch) == 5 + 9 + 1 + 6
    assert loss == pytest.approx(by_hand(model, batch).item(), rel=1e-5)


def test_ngrams_are_counted_and_judged_on_targets_alone() -> None:
    batch = marked_rows()
    ngrams = fit_ngrams([batch], 50)
    targets = [int(t) for t in batch[:, 1:].flatten() if not t & NO_TARGET]
    assert ngrams.target_counts.tolist() == np.bincount(targets, minlength=50).tolist()
    expected = -np.log(ngrams.unigram_probabilities())[targets].mean()
    assert ngrams.unigram_loss([batch]) == pytest.approx(expected)
