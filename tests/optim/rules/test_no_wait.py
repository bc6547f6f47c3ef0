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
    *({"constraint": name} for name in ("weight_norm", "radial_brake", "row_magnitude")),
    {"constraint": "row_magnitude", "cautious_decay": True, "row_fraction": 0.5},
    {"constraint": "weight_norm", "cautious_decay": True, "pre_norm": "row_col"},
    {"second_moment": "gradient", "row_fraction": 0.25, "nesterov": False},
    {"second_moment": "update", "post_norm": "normuon"},
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


def bits(tensor: Tensor) -> list[int]:
    return tensor.detach().reshape(-1).view(torch.uint8).tolist()


def everything(net: nn.Module, optimizer: Muon) -> dict[str, Any]:
    """The bits of all weights and of all state."""
    held = {name: bits(parameter) for name, parameter in net.named_parameters()}
    for name, parameter in net.named_parameters():
        for key, value in optimizer.state[parameter].items():
            held[f"{key} of {name}"] = bits(value) if isinstance(value, Tensor) else value
    return held


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("master", ["none", "float32", "stochastic"])
def test_a_cancelled_step_leaves_every_bit(
    monkeypatch: pytest.MonkeyPatch, master: str, options: dict[str, Any], before: int, bad: float
) -> None:
    net = model().to(torch.float32 if master == "none" else torch.bfloat16)
    optimizer = Muon(net, lr=0.02, master=master, nonfinite="skip", **options)
    with as_on_accelerator(monkeypatch):
        train(net, optimizer, torch.no_grad, steps=max(1, before))
        if not before:  # state of zeros, as before a first step
            for state in optimizer.state.values():
                for key, value in state.items():
                    if key != "master":
                        value.zero_()
        held = everything(net, optimizer)
        set_gradients(net, 1)
        for number, parameter in enumerate(net.parameters()):
            assert parameter.grad is not None
            parameter.grad.flatten()[:: number + 1] = bad
        optimizer.step()
        optimizer.check_finite()  # the counters go back
    assert everything(net, optimizer) == held


def test_a_first_cancelled_step_divides_by_no_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    net = model()
    optimizer = Muon(net, lr=0.02, nonfinite="skip", cautious_decay=True, eps=1e-50)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    set_gradients(net, 1)
    for parameter in net.parameters():
        assert parameter.grad is not None
        parameter.grad[0] = torch.nan
    with as_on_accelerator(monkeypatch):
        optimizer.step()
        optimizer.check_finite()
    for own, other in zip(net.parameters(), before, strict=True):
        assert torch.equal(own, other)


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
