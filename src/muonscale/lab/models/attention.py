"""Attention logits of a Hugging Face model: how large they are, heard where attention is computed.

The *logit* of a query and a key is what their softmax is taken of: the product of the two, after
rotary positions and norms, times the scale of the attention. Only pairs that attention sees count:
keys before the query, and inside the window where there is one.

Transformers' models call one of several attention functions, by a name in their configuration.
`heard` puts a name of ours there for the length of a block: its function shows query and key to a
listener and then does what was done before. Outside of the block nothing is different.

Letters: B sequences, T tokens of each, H heads of queries, G heads of keys (H a multiple of G), R =
H / G, D size of a head.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from muonscale.errors import ConfigError
from muonscale.optim.distributed.dtensor import to_local

LARGE = 100.0
"""Logits above it are counted (Liu et al., arXiv 2502.16982, appendix D)."""

BLOCK_BYTES, CPU_BLOCK_BYTES = 2**26, 2**21
"""Memory for logits at a time, there being never a whole `[B, H, T, T]`. On a CPU what fits into its
cache is faster (measured, 32 x 4 x 256 x 256: 123 ms in blocks of 2 MiB, 219 ms in 64 MiB)."""


@dataclass(frozen=True)
class LogitStatistics:
    """Of the logits of one layer."""

    largest_H: Tensor
    """Largest logit of every head, which may be below 0; -inf before anything was heard."""
    above: Tensor
    """Logits above `LARGE`, 0-D float64, of all heads together, ..."""
    pairs: Tensor
    """... of so many."""

    def __add__(self, other: LogitStatistics) -> LogitStatistics:
        """Return the statistics of both together."""
        return LogitStatistics(
            torch.maximum(self.largest_H, other.largest_H),
            self.above + other.above,
            self.pairs + other.pairs,
        )


@torch.no_grad()
def logit_statistics(
    query_BHTD: Tensor,
    key_BGTD: Tensor,
    *,
    scaling: float,
    mask: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    causal: bool = True,
    block_bytes: int | None = None,
) -> LogitStatistics:
    """Return how large the logits of one layer are, computed in float32 (float64 for float64).

    Args:
        query_BHTD: queries, as attention gets them.
        key_BGTD: keys, one head for every R heads of queries.
        scaling: what products are multiplied with.
        mask: `[B or 1, H or 1, T, T]`, true, or not hugely negative, where a query sees a key; it
            then says all. None: what `causal` and `window` say.
        window: a query sees so many keys, its own the last of them; None for all.
        softcap: logits are `softcap * tanh(logit / softcap)`; None leaves them as they are.
        causal: whether later keys are hidden.
        block_bytes: of logits at a time; None for what suits the device.
    """
    if block_bytes is None:
        block_bytes = CPU_BLOCK_BYTES if query_BHTD.device.type == "cpu" else BLOCK_BYTES
    dtype = torch.promote_types(query_BHTD.dtype, torch.float32)
    B, H, T, _ = query_BHTD.shape
    largest_H = torch.full((H,), -torch.inf, dtype=dtype, device=query_BHTD.device)
    above, pairs = (torch.zeros((), dtype=torch.float64, device=largest_H.device) for _ in "ab")
    with torch.autocast(query_BHTD.device.type, enabled=False):
        for batch, start, stop in _blocks(B, T, H * T * dtype.itemsize, block_bytes):
            queries_bHtD = query_BHTD[batch, :, start:stop].to(dtype)
            logits_bHtT = _products(queries_bHtD, key_BGTD[batch].to(dtype), scaling, softcap)
            if mask is not None:
                seen = _seen_in(mask, batch, start, stop)
            else:
                seen = _seen(start, stop, T, causal, window, largest_H.device)
            logits_bHtT.masked_fill_(~seen, -torch.inf)
            largest_H = torch.maximum(largest_H, logits_bHtT.amax((0, 2, 3)))
            above += (logits_bHtT > LARGE).sum()
            pairs += seen.sum() * (logits_bHtT.numel() // seen.numel())
    return LogitStatistics(largest_H, above, pairs)


@torch.no_grad()
def seen_logits(
    query_BHTD: Tensor,
    key_BGTD: Tensor,
    *,
    scaling: float,
    mask: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    causal: bool = True,
) -> Tensor:
    """Return all the logits that `logit_statistics` is of, in one row: for small inputs."""
    dtype = torch.promote_types(query_BHTD.dtype, torch.float32)
    T = query_BHTD.shape[2]
    with torch.autocast(query_BHTD.device.type, enabled=False):
        logits_BHTT = _products(query_BHTD.to(dtype), key_BGTD.to(dtype), scaling, softcap)
    if mask is not None:
        seen = _seen_in(mask, slice(None), 0, T)
    else:
        seen = _seen(0, T, T, causal, window, logits_BHTT.device)
    return logits_BHTT[seen.expand_as(logits_BHTT)]


def _products(
    query_bHtD: Tensor, key_bGTD: Tensor, scaling: float, softcap: float | None
) -> Tensor:
    """Return logits `[b, H, t, T]`."""
    H, G = query_bHtD.shape[1], key_bGTD.shape[1]
    q_bGRtD = query_bHtD.unflatten(1, (G, H // G))
    # Heads that share a key are rows of one product, so that no key is copied.
    logits_bHtT = (q_bGRtD.flatten(2, 3) @ key_bGTD.mT).mul_(scaling)
    logits_bHtT = logits_bHtT.unflatten(2, q_bGRtD.shape[2:4]).flatten(1, 2)
    return logits_bHtT if softcap is None else torch.tanh(logits_bHtT / softcap) * softcap


def _blocks(
    sequences: int, queries: int, row_bytes: int, block_bytes: int
) -> Iterator[tuple[slice, int, int]]:
    """Yield (sequences, first query, end): whole sequences, or queries of one at a time."""
    rows = max(1, block_bytes // row_bytes)
    if rows >= queries:
        step = rows // queries
        for first in range(0, sequences, step):
            yield slice(first, min(first + step, sequences)), 0, queries
        return
    for number in range(sequences):
        for start in range(0, queries, rows):
            yield slice(number, number + 1), start, min(start + rows, queries)


def _seen(
    start: int, stop: int, keys: int, causal: bool, window: int | None, device: torch.device
) -> Tensor:
    behind = torch.arange(start, stop, device=device)[:, None] - torch.arange(keys, device=device)
    seen = behind >= 0 if causal else torch.ones_like(behind, dtype=torch.bool)
    return seen if window is None else seen & (behind < window)


def _seen_in(mask: Tensor, batch: slice, start: int, stop: int) -> Tensor:
    part = mask[batch if mask.shape[0] > 1 else slice(None), :, start:stop]
    return part if part.dtype == torch.bool else part > torch.finfo(part.dtype).min / 2


# --- hearing ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heard:
    """The attention that a module computes; called, it gives the statistics of its logits."""

    query_BHTD: Tensor
    key_BGTD: Tensor
    options: dict[str, Any]
    """Of `logit_statistics`."""

    def __call__(self) -> LogitStatistics:
        """Return how large the logits are."""
        return logit_statistics(self.query_BHTD, self.key_BGTD, **self.options)

    def logits(self) -> Tensor:
        """Return all of those that are seen, in one row."""
        return seen_logits(self.query_BHTD, self.key_BGTD, **self.options)


Listener = Callable[[nn.Module, Heard], None]
"""Told of every attention that is computed, and of the module that computes it."""

_PREFIX = "muonscale_"
_listeners: list[Listener] = []


def is_attention(module: nn.Module) -> bool:
    """Return whether a module of a transformers model computes attention."""
    return hasattr(module, "is_causal") and hasattr(module, "layer_idx")


def attention_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the modules of a model that can be heard, by name, on any device.

    Raises:
        ConfigError: for a model whose attention does not go through transformers' interface.
    """
    found = {name: module for name, module in model.named_modules() if is_attention(module)}
    if not found or not model._supports_attention_backend:
        raise ConfigError(
            f"the attention of model_type {model.config.model_type!r} ({type(model).__name__}) does "
            "not go through transformers' attention interface, so its logits cannot be heard; "
            "accepted: telemetry.attention_every=null and optimizer.qk_clip=null"
        )
    return found


@contextmanager
def heard(model: PreTrainedModel, listener: Listener) -> Generator[None]:
    """Tell a listener of every attention that a model computes in this block."""
    config = model.config
    former = config._attn_implementation
    config._attn_implementation = _listening(former or "eager")
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.pop()
        config._attn_implementation = former


def _listening(name: str) -> str:
    """Return the name of the attention function `name` that is heard, registering it once."""
    ours = f"{_PREFIX}{name}"
    if ours not in ALL_ATTENTION_FUNCTIONS:

        def attend(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
            _tell(module, query, key, args[1] if len(args) > 1 else None, kwargs)
            return _implementation(name, module)(module, query, key, *args, **kwargs)

        AttentionInterface.register(ours, attend)
        AttentionMaskInterface.register(ours, ALL_MASK_ATTENTION_FUNCTIONS[name])
    return ours


def _implementation(name: str, module: nn.Module) -> Callable[..., Any]:
    """Return what computes attention; every model file of transformers has an `eager` of its own."""
    if name != "eager":
        return ALL_ATTENTION_FUNCTIONS[name]
    return sys.modules[type(module).__module__].eager_attention_forward


@torch.compiler.disable
def _tell(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> None:
    mask = options.get("attention_mask", mask)
    scaling = options.get("scaling")
    causal = options.get("is_causal")
    heard_now = Heard(
        to_local(query.detach()),
        to_local(key.detach()),
        {
            "scaling": query.shape[-1] ** -0.5 if scaling is None else scaling,
            "mask": mask,
            "window": options.get("sliding_window"),
            "softcap": options.get("softcap"),
            "causal": module.is_causal if causal is None else causal,
        },
    )
    for listener in _listeners:
        listener(module, heard_now)
