"""The loss of a model on rows of tokens, and bits per byte, independent of the tokenizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from muonscale.errors import DataError
from muonscale.lab.data.loss_mask import IGNORED, is_marked, targets_of_rows, unpack


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
    parts = _parts(logits(inputs, positions).flatten(0, 1), targets.flatten())
    losses = [functional.cross_entropy(x.float(), t, reduction="none") for x, t in parts]
    summed = torch.cat(losses).view(targets.shape).cpu().double().sum(1)  # mps has no float64
    return summed.numpy(), targets_of_rows(batch)


LOSS_CHUNK = 2**24
"""Number of logits that are in float32 at a time: 64 MiB."""


def summed_loss(logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
    """Return the sum of the cross entropy of targets, 0-D float32, in nats.

    Losses are computed in float32, a part of the tokens at a time, and computed again in the
    backward pass: besides the logits only their gradient takes memory, in their dtype.

    Args:
        logits_BLV: `[B, L, V]`, any floating dtype.
        targets_BL: int64 `[B, L]`; `IGNORED` where a token is no target.
    """
    return _SummedLoss.apply(logits_BLV.flatten(0, 1), targets_BL.flatten())


def loss_bytes(tokens: int, vocabulary: int, itemsize: int) -> int:
    """Return the most memory that logits and `summed_loss` take, forward and backward, in bytes."""
    number = tokens * vocabulary
    part = min(number, max(1, LOSS_CHUNK // vocabulary) * vocabulary)
    return 2 * itemsize * number + (0 if itemsize == 4 else 8 * part)


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        ctx.save_for_backward(logits_NV, targets_N)
        total = torch.zeros((), dtype=torch.float32, device=logits_NV.device)
        for logits, targets in _parts(logits_NV, targets_N):
            total += functional.cross_entropy(logits.float(), targets, reduction="sum")
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # pyrefly: ignore
        logits_NV, targets_N = ctx.saved_tensors
        result = torch.empty_like(logits_NV)
        for part, logits, targets in _parts(result, logits_NV, targets_N):
            _write_gradient_(part, logits, targets, gradients[0])
        return result, None


def _write_gradient_(out_NV: Tensor, logits_NV: Tensor, targets_N: Tensor, scale: Tensor) -> None:
    """Write `scale * (softmax(logits) - one_hot(targets))`, and 0 where there is no target."""
    is_wide = out_NV.dtype == torch.float32
    wide_NV = out_NV if is_wide else torch.empty_like(out_NV, dtype=torch.float32)
    torch.softmax(logits_NV, dim=-1, dtype=torch.float32, out=wide_NV)
    places_N1 = targets_N.clamp_min(0).unsqueeze(1)
    wide_NV.scatter_add_(1, places_N1, torch.full_like(places_N1, -1, dtype=torch.float32))
    wide_NV.mul_(torch.where(targets_N == IGNORED, 0.0, scale).unsqueeze(1))
    if not is_wide:
        out_NV.copy_(wide_NV)


def _parts(logits_NV: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    rows = max(1, LOSS_CHUNK // logits_NV.shape[1])
    return zip(*(tensor.split(rows) for tensor in (logits_NV, *others)), strict=True)


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
