"""A step never waits for an accelerator: its path runs here on CPU tensors, and nothing is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from muonscale.errors import DivergedError
from muonscale.optim.muon import Muon
from muonscale.optim.newton_schulz import orthogonalize
from muonscale.optim.rules import nonfinite

aten = torch.ops.aten
READS = (
    aten._local_scalar_dense,
    aten.nonzero,
    aten.equal,
    aten.is_nonzero,
    aten.masked_select,
    aten.unique_dim,
    aten._unique2,
)
"""Operations whose result the host needs, so that it waits for the device."""


class NoReads(TorchDispatchMode):
    """Fails on an operation that makes the host wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in READS:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


class Arrived:
    """Stands for the event after the copy of the flag."""

    def synchronize(self) -> None: ...


@contextmanager
def as_on_accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Let steps treat CPU tensors as those of an accelerator; yield what is sent to the host."""
    sent: list[Tensor] = []

    def send(tensor: Tensor) -> tuple[Tensor, Arrived]:
        sent.append(tensor.clone())
        return sent[-1], Arrived()

    for module in (nonfinite, orthogonalize):
        monkeypatch.setattr(module, "is_on_host", lambda tensor: False)
    monkeypatch.setattr(nonfinite, "send_to_host", send)
    yield sent


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(11, 8), nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 8), nn.Linear(8, 11)
    )


def set_gradients(net: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def train(net: nn.Module, optimizer: Muon, guard: Callable[[], Any], steps: int = 3) -> None:
    for step in range(steps):
        set_gradients(net, step)
        with guard():
            optimizer.step()


OPTIONS: list[dict[str, Any]] = [
    {},
    {"nesterov": False, "ns_form": "gram"},
    {"ns_dtype": torch.bfloat16, "comm_dtype": "bfloat16"},
    *({"post_norm": name} for name in ("row", "col_row", "normuon", "frobenius")),
    {"scale": "rms_exact", "cautious_decay": True},
    {"decay": "independent", "betas": (0.8, 0.9)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_is_read_in_a_step(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], dtype: torch.dtype
) -> None:
    if dtype == torch.bfloat16:
        options = {"master": "float32", **options}
    expected = model().to(dtype)
    train(expected, Muon(expected, lr=0.02, **options), torch.no_grad)
    net = model().to(dtype)
    optimizer = Muon(net, lr=0.02, **options)
    with as_on_accelerator(monkeypatch) as sent:
        train(net, optimizer, NoReads)
        optimizer.check_finite()
    assert len(sent) == 3  # one flag for each step
    for own, other in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(own, other)


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_told_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = model()
    optimizer = Muon(net, lr=0.02)
    with as_on_accelerator(monkeypatch):
        train(net, optimizer, NoReads, steps=1)
        before = [parameter.detach().clone() for parameter in net.parameters()]
        set_gradients(net, 1)
        next(net.parameters()).grad[0] = torch.nan
        with NoReads():
            optimizer.step()
        for own, other in zip(net.parameters(), before, strict=True):
            assert torch.equal(own, other)
        with pytest.raises(DivergedError, match=r"0\.weight"):
            optimizer.step()
