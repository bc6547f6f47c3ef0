"""Attention logits of a Hugging Face model, recorded where attention is computed.

The *logit* of a query and a key is the argument of their softmax: the product of the two, after
rotary positions and norms, times the scale of the attention. Only pairs that are not masked count:
keys before the query, and inside the window if there is one.

Transformers' models call one of several attention functions, by a name in their configuration.
`hook_attention` replaces this name for the length of a block: our function passes query and key to
a hook and then calls the original one. Outside of the block nothing changes.

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
"""Memory for logits at a time; a whole `[B, H, T, T]` is never allocated. Blocks that fit into the
cache of a CPU are faster (measured, 32 x 4 x 256 x 256: 123 ms in blocks of 2 MiB, 219 ms in
64 MiB)."""


@dataclass(frozen=True)
class LogitStatistics:
    """Statistics of the logits of one layer."""

    largest_H: Tensor
    """Largest logit of every head, which may be negative; -inf before any was recorded."""
    above: Tensor
    """Number of logits above `LARGE`, 0-D float64, over all heads."""
    pairs: Tensor
    """Number of logits."""

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
    """Return the statistics of the logits of one layer, computed in float32 (float64 for float64).

    Args:
        query_BHTD: queries, as attention gets them.
        key_BGTD: keys, one head for every R heads of queries.
        scaling: factor of the products.
        mask: `[B or 1, H or 1, T, T]`, true, or not hugely negative, where a query attends to a
            key; it replaces `causal` and `window`. None to use those.
        window: number of keys that a query attends to, the last of them its own; None for all.
        softcap: logits are `softcap * tanh(logit / softcap)`; None leaves them unchanged.
        causal: whether later keys are masked.
        block_bytes: bytes of logits at a time; by default it depends on the device.
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
            visible = _visible(mask, batch, start, stop, T, causal, window, largest_H.device)
            logits_bHtT.masked_fill_(~visible, -torch.inf)
            largest_H = torch.maximum(largest_H, logits_bHtT.amax((0, 2, 3)))
            above += (logits_bHtT > LARGE).sum()
            pairs += visible.sum() * (logits_bHtT.numel() // visible.numel())
    return LogitStatistics(largest_H, above, pairs)


@torch.no_grad()
def visible_logits(
    query_BHTD: Tensor,
    key_BGTD: Tensor,
    *,
    scaling: float,
    mask: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    causal: bool = True,
) -> Tensor:
    """Return all the logits that `logit_statistics` describes, in one row: for small inputs."""
    dtype = torch.promote_types(query_BHTD.dtype, torch.float32)
    T = query_BHTD.shape[2]
    with torch.autocast(query_BHTD.device.type, enabled=False):
        logits_BHTT = _products(query_BHTD.to(dtype), key_BGTD.to(dtype), scaling, softcap)
    visible = _visible(mask, slice(None), 0, T, T, causal, window, logits_BHTT.device)
    return logits_BHTT[visible.expand_as(logits_BHTT)]


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


def _visible(
    mask: Tensor | None,
    batch: slice,
    start: int,
    stop: int,
    keys: int,
    causal: bool,
    window: int | None,
    device: torch.device,
) -> Tensor:
    """Return which keys the queries from `start` to `stop` attend to, bool."""
    if mask is not None:
        part = mask[batch if mask.shape[0] > 1 else slice(None), :, start:stop]
        return part if part.dtype == torch.bool else part > torch.finfo(part.dtype).min / 2
    behind = torch.arange(start, stop, device=device)[:, None] - torch.arange(keys, device=device)
    visible = behind >= 0 if causal else torch.ones_like(behind, dtype=torch.bool)
    return visible if window is None else visible & (behind < window)


@dataclass(frozen=True)
class AttentionInputs:
    """The inputs of one attention call; calling it returns the statistics of the logits."""

    query_BHTD: Tensor
    key_BGTD: Tensor
    options: dict[str, Any]
    """Options of `logit_statistics`."""

    def __call__(self) -> LogitStatistics:
        """Return the statistics of the logits."""
        return logit_statistics(self.query_BHTD, self.key_BGTD, **self.options)

    def logits(self) -> Tensor:
        """Return all logits that are not masked, in one row."""
        return visible_logits(self.query_BHTD, self.key_BGTD, **self.options)


AttentionHook = Callable[[nn.Module, AttentionInputs], None]
"""Called for every attention call with the attention module and its inputs."""

_PREFIX = "muonscale_"
_hooks: list[AttentionHook] = []


def is_attention(module: nn.Module) -> bool:
    """Return whether a module of a transformers model computes attention."""
    return hasattr(module, "is_causal") and hasattr(module, "layer_idx")


def attention_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the attention modules of a model by name, on any device.

    Raises:
        ConfigError: for a model whose attention does not use transformers' interface.
    """
    modules = {name: module for name, module in model.named_modules() if is_attention(module)}
    if not modules or not model._supports_attention_backend:
        raise ConfigError(
            f"the attention of model_type {model.config.model_type!r} ({type(model).__name__}) "
            "does not use transformers' attention interface, so its logits cannot be recorded; "
            "accepted: telemetry.attention_every=null and optimizer.qk_clip=null"
        )
    return modules


@contextmanager
def hook_attention(model: PreTrainedModel, hook: AttentionHook) -> Generator[None]:
    """Call a hook for every attention call of a model in this block."""
    config = model.config
    former = config._attn_implementation
    config._attn_implementation = _register_hooked(former or "eager")
    _hooks.append(hook)
    try:
        yield
    finally:
        _hooks.pop()
        config._attn_implementation = former


def _register_hooked(name: str) -> str:
    """Register the attention function `name` with hooks once, and return its new name."""
    ours = f"{_PREFIX}{name}"
    if ours not in ALL_ATTENTION_FUNCTIONS:

        def attend(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
            _call_hooks(module, query, key, args[1] if len(args) > 1 else None, kwargs)
            if name == "eager":  # every model file of transformers has its own
                function = sys.modules[type(module).__module__].eager_attention_forward
            else:
                function = ALL_ATTENTION_FUNCTIONS[name]
            return function(module, query, key, *args, **kwargs)

        AttentionInterface.register(ours, attend)
        AttentionMaskInterface.register(ours, ALL_MASK_ATTENTION_FUNCTIONS[name])
    return ours


@torch.compiler.disable
def _call_hooks(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> None:
    scaling = options.get("scaling")
    causal = options.get("is_causal")
    inputs = AttentionInputs(
        to_local(query.detach()),
        to_local(key.detach()),
        {
            "scaling": query.shape[-1] ** -0.5 if scaling is None else scaling,
            "mask": options.get("attention_mask", mask),
            "window": options.get("sliding_window"),
            "softcap": options.get("softcap"),
            "causal": module.is_causal if causal is None else causal,
        },
    )
    for hook in _hooks:
        hook(module, inputs)
