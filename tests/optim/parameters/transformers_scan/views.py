"""Which features of linear layers' outputs are viewed apart, found by running models on meta.

The data flow of `flow` reads code and so may misread it. Here a model runs, without numbers, and
every view of the storage of a linear layer's output is compared with the features it covers.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.optim.parameters.transformers_scan.build import time_limit

aten = torch.ops.aten
VIEWS = {"slice", "split", "split_with_sizes", "unbind", "select", "narrow", "alias", "as_strided"}
ROTARY = re.compile(r"rot|rope", re.I)


@dataclass(frozen=True)
class Piece:
    """A view that covers a part of a layer's features."""

    features: int
    """Features that it covers."""
    runs: int
    """Stretches of neighboring features in it."""
    of: int
    """Features of the layer."""

    def __str__(self) -> str:
        return f"{self.features} of {self.of} features in {self.runs} runs"


@dataclass
class Run:
    """What one model showed."""

    layers: int = 0
    """Linear layers that ran."""
    error: str = ""
    """Why it did not run to the end."""
    pieces: dict[tuple[str, str], set[Piece]] = field(default_factory=dict)
    """By class around the layer and its place in it."""


class WatchViews(TorchDispatchMode):
    """Record views of tagged storages that cover a part of the features."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: dict[int, tuple[tuple[str, str], int]] = {}
        self.kept: list[Tensor] = []
        """Outputs, kept so that no other tensor gets their storage."""
        self.pieces: dict[tuple[str, str], set[Piece]] = {}

    def tag(self, output: Tensor, key: tuple[str, str]) -> None:
        whole = output.untyped_storage().nbytes() == output.numel() * output.element_size()
        if whole and output.is_contiguous():
            self.tags[_storage(output)] = key, output.shape[-1]
            self.kept.append(output)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            return {torch.bool: True}.get(args[0].dtype, 0.0 if args[0].is_floating_point() else 0)
        if func is aten.nonzero.default and args[0].is_meta:
            return torch.empty(0, args[0].ndim, dtype=torch.long, device="meta")
        if func is aten.is_nonzero.default:
            return True
        out = func(*args, **(kwargs or {}))
        if func.__name__.split(".")[0] in VIEWS and isinstance(args[0], Tensor):
            tag = self.tags.get(_storage(args[0]))
            if tag is not None and not _turns_heads():
                self._look_at(out if isinstance(out, (list, tuple)) else [out], *tag)
        return out

    def _look_at(self, views: Any, key: tuple[str, str], features: int) -> None:
        for view in views:
            inside = view.numel() and _storage(view) in self.tags
            if inside and (piece := _piece(view, features)) is not None:
                self.pieces.setdefault(key, set()).add(piece)


def run(model: nn.Module, seconds: int = 40) -> Run:
    """Run the forward pass of a model on the meta device, as far as it goes."""
    watch, result, handles = WatchViews(), Run(), []

    def hook(key: tuple[str, str]) -> Any:
        def after(module: nn.Module, given: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            if isinstance(output, Tensor):
                result.layers += 1
                watch.tag(output, key)

        return after

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            handles.append(module.register_forward_hook(hook(_place(model, name))))
        if hasattr(module, "is_transposed") and hasattr(module, "is_concatenated"):
            module.forward = lambda x, *_, **__: torch.zeros_like(x)  # experts ask for numbers
    model.eval()
    try:
        with time_limit(seconds), torch.no_grad(), watch:
            model(**_inputs(model))
    except Exception as error:
        result.error = f"{type(error).__name__}: {str(error)[:100]}"
    for handle in handles:
        handle.remove()
    result.pieces = watch.pieces
    return result


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _piece(view: Tensor, features: int) -> Piece | None:
    """Return which features a view covers, None for all."""
    places = torch.tensor([view.storage_offset() % features])
    for size, stride in zip(view.shape, view.stride(), strict=True):
        if stride % features:
            places = (places[:, None] + torch.arange(size) * stride).reshape(-1) % features
            places = places.unique()
    if len(places) >= features:
        return None
    runs = int((places.diff() > 1).sum()) + 1
    return Piece(len(places), runs, features)


def _turns_heads() -> bool:
    """Return whether a function that applies rotary embeddings is running."""
    frame = sys._getframe(2)
    for _ in range(8):
        if frame is None:
            return False
        if ROTARY.search(frame.f_code.co_name):
            return True
        frame = frame.f_back
    return False


def _place(model: nn.Module, name: str) -> tuple[str, str]:
    """Return the class around a layer and its place there, lists and sequences looked through."""
    around, _, place = name.rpartition(".")
    module = model.get_submodule(around)
    while around and isinstance(module, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
        around, _, outer = around.rpartition(".")
        place = f"{outer}.{place}"
        module = model.get_submodule(around)
    return type(module).__name__, place


def _inputs(model: Any) -> dict[str, Any]:
    """Return inputs on meta for the main input of a model."""
    main = getattr(model, "main_input_name", "input_ids")
    config = model.config
    with _on_meta():
        if main == "pixel_values":
            vision = getattr(config, "vision_config", config)
            size = getattr(vision, "image_size", 224)
            height, width = size if isinstance(size, (list, tuple)) else (size, size)
            return {main: torch.zeros(1, getattr(vision, "num_channels", 3), height, width)}
        if main == "input_values":
            return {main: torch.zeros(1, 16000)}
        if main == "input_features":
            bins = getattr(config, "num_mel_bins", 80)
            return {main: torch.zeros(1, bins, 3000)}
        given: dict[str, Any] = {"input_ids": torch.zeros(1, 16, dtype=torch.long)}
        parameters = inspect.signature(model.forward).parameters
        if "decoder_input_ids" in parameters:
            given["decoder_input_ids"] = given["input_ids"]
        if "use_cache" in parameters:
            given["use_cache"] = False
        return given


@contextlib.contextmanager
def _on_meta() -> Iterator[None]:
    with torch.device("meta"):
        yield
