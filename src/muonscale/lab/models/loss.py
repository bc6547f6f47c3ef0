"""The loss of a model on rows of tokens, and bits per byte, independent of the tokenizer."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from muonscale.errors import DataError
from muonscale.lab.data.loss_mask import is_marked, targets_of_rows, unpack


def causal_logits(model: nn.Module, ids_BL: Tensor, positions_BL: Tensor | None = None) -> Tensor:
    """Return `[B, L, V]` logits of token ids.

    Positions split a row before every 0: tokens do not attend to tokens before the split.
    """
    places = {} if positions_BL is None else {"position_ids": positions_BL}
    return model(input_ids=ids_BL, use_cache=False, **places).logits


def row_losses(
    logits: Callable[[Tensor, Tensor | None], Tensor], batch: np.ndarray, device: torch.device
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the summed loss of each row of a batch `[B, L+1]`, in nats, and its targets: `[B]`.

    Args:
        logits: maps token ids and their positions to logits, as `Parallelized.logits`.
        batch: rows, with a loss mask or without (see `muonscale.lab.data.loss_mask`).
        device: device of the model.
    """
    rows = torch.tensor(batch, dtype=torch.int64, device=device)
    inputs, targets, positions = rows[:, :-1], rows[:, 1:], None
    if is_marked(batch):
        masked = unpack(rows)
        inputs, targets, positions = masked.inputs_BL, masked.targets_BL, masked.positions_BL
    losses = functional.cross_entropy(
        logits(inputs, positions).flatten(0, 1).float(), targets.flatten(), reduction="none"
    )
    summed = losses.view(targets.shape).cpu().double().sum(1)  # mps has no float64
    return summed.numpy(), targets_of_rows(batch)


def mean_loss(total: float, tokens: float) -> float:
    """Return the loss per token.

    Raises:
        DataError: if there are no targets.
    """
    if tokens == 0:
        raise DataError(
            f"there are {tokens:g} validation tokens; give more text, or a larger data.validation"
        )
    return total / tokens


def bits_per_byte(loss_nats: float, bytes_per_token: float) -> float:
    """Convert a loss per token to bits per byte of text.

    Args:
        loss_nats: loss in nats per token.
        bytes_per_token: UTF-8 bytes of the evaluated text over its number of tokens, above 0.
    """
    return loss_nats / math.log(2) / bytes_per_token
