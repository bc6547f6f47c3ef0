"""The mean loss of a model on batches in one process."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from transformers import PreTrainedModel

from muonscale.lab.models.contexts import evaluation_mode
from muonscale.lab.models.loss import causal_logits, mean_loss, row_losses


def loss_on_batches(model: PreTrainedModel, batches: Iterable[np.ndarray]) -> tuple[float, int]:
    """Return the mean loss over all target tokens in nats, and their number."""
    device = next(model.parameters()).device
    total, tokens = 0.0, 0
    with evaluation_mode(model):
        for batch in batches:
            losses, targets = row_losses(
                lambda ids, positions: causal_logits(model, ids, positions), batch, device
            )
            total, tokens = total + float(losses.sum()), tokens + int(targets.sum())
    return mean_loss(total, tokens), tokens
