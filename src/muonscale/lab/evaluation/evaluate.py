"""Held-out loss of a model, and its unit that does not depend on the tokenizer, bits per byte."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from muonscale.errors import DataError


def held_out_loss(model: PreTrainedModel, batches: Iterable[np.ndarray]) -> tuple[float, int]:
    """Return the mean loss over all target tokens, and their number.

    Every token weighs the same, whatever the shapes of the batches. The model is in evaluation mode
    meanwhile and goes back to the mode it was in.

    Args:
        model: a causal language model.
        batches: int64 [B, L+1] token ids; positions 1 to L are the targets.

    Returns:
        The loss in nats per token, summed in float64, and the number of targets.

    Raises:
        DataError: if there are no targets.
    """
    training = model.training
    model.eval()
    try:
        total, tokens = _sum_losses(model, batches)
    finally:
        model.train(training)
    if tokens == 0:
        raise DataError("there are no held-out tokens to evaluate on")
    return total / tokens, tokens


@torch.inference_mode()
def _sum_losses(model: PreTrainedModel, batches: Iterable[np.ndarray]) -> tuple[float, int]:
    device = next(model.parameters()).device
    total, tokens = 0.0, 0
    for batch in batches:
        ids = torch.tensor(batch, dtype=torch.int64, device=device)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        losses = functional.cross_entropy(
            logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
        )
        total += float(losses.double().sum())
        tokens += losses.numel()
    return total, tokens


def bits_per_byte(loss_nats: float, bytes_per_token: float) -> float:
    """Convert a loss per token to bits per byte of text.

    Args:
        loss_nats: loss in nats per token.
        bytes_per_token: UTF-8 bytes of the evaluated text over its number of tokens, above 0.
    """
    return loss_nats / math.log(2) / bytes_per_token
