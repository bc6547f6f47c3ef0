"""Held-out loss of a model, and its unit that does not depend on the tokenizer, bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from muonscale.errors import DataError
from muonscale.lab.data.loss_mask import count_targets, is_marked, unpack


def held_out_loss(model: PreTrainedModel, batches: Iterable[np.ndarray]) -> tuple[float, int]:
    """Return the mean loss over all target tokens, and their number.

    Every token weighs the same, whatever the shapes of the batches. The model is in evaluation mode
    meanwhile and goes back to the mode it was in.

    Args:
        model: a causal language model.
        batches: int64 [B, L+1] token ids; positions 1 to L are the targets, but for those marked.

    Returns:
        The loss in nats per token, summed in float64, and the number of targets.

    Raises:
        DataError: if there are no targets.
    """
    device = next(model.parameters()).device
    total, tokens = 0.0, 0
    with evaluating(model):
        for batch in batches:
            loss, number = summed_loss(
                lambda ids, positions: causal_logits(model, ids, positions), batch, device
            )
            total, tokens = total + loss, tokens + number
    return mean_loss(total, tokens), tokens


def causal_logits(model: nn.Module, ids_BL: Tensor, positions_BL: Tensor | None = None) -> Tensor:
    """Return `[B, L, V]` logits of token ids.

    Where positions are given, a row is cut before every 0: tokens see none before the cut.
    """
    places = {} if positions_BL is None else {"position_ids": positions_BL}
    return model(input_ids=ids_BL, use_cache=False, **places).logits


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Put a model into evaluation mode, without gradients, and back into the mode it was in."""
    training = model.training
    model.eval()
    try:
        # Not inference_mode: what FSDP gathers within it could not be used in training again.
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def summed_loss(
    logits: Callable[[Tensor, Tensor | None], Tensor], batch: np.ndarray, device: torch.device
) -> tuple[float, int]:
    """Return the sum of the losses of a batch `[B, L+1]`, in nats, and the number of targets.

    Args:
        logits: of token ids and their positions, as `Parallelized.logits`.
        batch: rows, marked or not (see `muonscale.lab.data.loss_mask`).
        device: of the model.
    """
    rows = torch.tensor(batch, dtype=torch.int64, device=device)
    inputs, targets, positions = rows[:, :-1], rows[:, 1:], None
    if is_marked(batch):
        marked = unpack(rows)
        inputs, targets, positions = marked.inputs_BL, marked.targets_BL, marked.positions_BL
    losses = functional.cross_entropy(
        logits(inputs, positions).flatten(0, 1).float(), targets.flatten(), reduction="none"
    )
    return float(losses.double().sum()), count_targets(batch)


def mean_loss(total: float, tokens: float) -> float:
    """Return the loss per token.

    Raises:
        DataError: if there are no targets.
    """
    if tokens == 0:
        raise DataError(
            f"there are {tokens:g} held-out tokens to evaluate on; give more text, or a larger data.held_out"
        )
    return total / tokens


def bits_per_byte(loss_nats: float, bytes_per_token: float) -> float:
    """Convert a loss per token to bits per byte of text.

    Args:
        loss_nats: loss in nats per token.
        bytes_per_token: UTF-8 bytes of the evaluated text over its number of tokens, above 0.
    """
    return loss_nats / math.log(2) / bytes_per_token
