from __future__ import annotations

import pytest
import torch

from muonscale import Muon
from muonscale.optim.rules.adamw import adamw_step_
from muonscale.optim.rules.master_weights import Weights
from muonscale.optim.rules.reference import adamw_step

COMMON = {"lr": 3e-2, "betas": (0.9, 0.95), "eps": 1e-3}
OPTIONS = {**COMMON, "rate": 3e-2 * 0.3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_equals_torch_and_the_slow_version(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    W = [torch.randn(3, 4, dtype=dtype), torch.randn(5, dtype=dtype)]
    M, V = [torch.zeros_like(w) for w in W], [torch.zeros_like(w) for w in W]
    theirs = [torch.nn.Parameter(w.clone()) for w in W]
    optimizer = torch.optim.AdamW(theirs, **COMMON, weight_decay=0.3)
    slow = [tuple(t.clone() for t in state) for state in zip(W, M, V, strict=True)]
    for step in range(1, 6):
        G = [torch.randn_like(w) for w in W]
        for parameter, g in zip(theirs, G, strict=True):
            parameter.grad = g.clone()
        optimizer.step()
        adamw_step_(Weights(stored=W), G, M, V, [step] * 2, **OPTIONS)
        slow = [
            adamw_step(w, g, m, v, step, **OPTIONS) for (w, m, v), g in zip(slow, G, strict=True)
        ]
    for ours, parameter, (w, _, _) in zip(W, theirs, slow, strict=True):
        torch.testing.assert_close(ours, parameter.detach(), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(ours.double(), w.double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(M[-1].double(), slow[-1][1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(V[-1].double(), slow[-1][2], rtol=1e-5, atol=1e-6)


def test_a_bf16_parameter_is_rounded_once_per_step() -> None:
    torch.manual_seed(0)
    W, G = torch.randn(64).bfloat16(), torch.randn(64)
    M, V = torch.zeros(64), torch.zeros(64)
    expected, _, _ = adamw_step(W, G, M, V, 1, **OPTIONS)
    adamw_step_(Weights(stored=[W]), [G], [M], [V], [1], **OPTIONS)
    assert W.dtype == torch.bfloat16
    assert torch.equal(W, expected.bfloat16())


@pytest.mark.parametrize("good", [True, False])
def test_a_mask_lets_all_through_or_nothing(good: bool) -> None:
    torch.manual_seed(0)
    W, M, V = [torch.randn(6)], [torch.randn(6)], [torch.rand(6)]
    before = [t[0].clone() for t in (W, M, V)]
    expected = [[t.clone()] for t in before]
    G = [torch.randn(6)]
    adamw_step_(Weights(stored=expected[0]), G, expected[1], expected[2], [3], **OPTIONS)
    if not good:
        G[0][2] = float("inf")
    adamw_step_(Weights(stored=W), G, M, V, [3], **OPTIONS, mask=torch.tensor(good))
    wanted = [t[0] for t in expected] if good else before
    assert all(torch.equal(t[0], want) for t, want in zip((W, M, V), wanted, strict=True))


def stepped(W: list[torch.Tensor], **options: object) -> tuple[Muon, list[torch.nn.Parameter]]:
    parameters = [torch.nn.Parameter(w.clone()) for w in W]
    optimizer = Muon([{"params": parameters, "rule": "adamw"}], lr=1e-2, **options)
    for seed in range(4):
        torch.manual_seed(seed)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, dtype=parameter.dtype)
        optimizer.step()
    return optimizer, parameters


@pytest.mark.parametrize("decay", ["coupled", "independent"])
def test_it_is_the_fused_kernel_of_torch_bit_for_bit(decay: str) -> None:
    torch.manual_seed(9)
    W = [torch.randn(7, 5), torch.randn(3), torch.randn(2, 3, 4)]
    weight_decay = {"coupled": 0.1, "independent": 1e-3}[decay]
    _, ours = stepped(W, weight_decay=weight_decay, decay=decay)
    theirs = [torch.nn.Parameter(w.clone()) for w in W]
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizer = torch.optim.AdamW(theirs, **options, fused=True)
    for seed in range(4):
        torch.manual_seed(seed)
        for parameter in theirs:
            parameter.grad = torch.randn(parameter.shape)
        optimizer.step()
    for left, right in zip(ours, theirs, strict=True):
        assert torch.equal(left, right)


def kernels(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the number of tensors of every call of the kernel."""
    calls: list[int] = []
    kernel = torch._fused_adamw_
    monkeypatch.setattr(
        torch,
        "_fused_adamw_",
        lambda W, *rest, **kw: (calls.append(len(W)), kernel(W, *rest, **kw)),
    )
    return calls


@pytest.mark.parametrize(
    ("W", "options"),
    [
        ([torch.randn(4, 6).T, torch.randn(3)], {}),
        ([torch.randn(4), torch.randn(3).double()], {}),
        ([torch.randn(4).bfloat16().float()], {"cautious_decay": True}),
    ],
    ids=["transposed", "two dtypes", "cautious decay"],
)
def test_what_the_kernel_cannot_take_is_stepped_without_it(
    W: list[torch.Tensor], options: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = kernels(monkeypatch)
    _, found = stepped(W, **options)
    assert not calls
    expected = [(w.double(), torch.zeros_like(w).double(), torch.zeros_like(w).double()) for w in W]
    cautious = options.get("cautious_decay", False)
    for seed in range(4):
        torch.manual_seed(seed)
        G = [torch.randn(w.shape, dtype=w.dtype) for w in W]
        expected = [
            reference(state, g, seed + 1, cautious) for state, g in zip(expected, G, strict=True)
        ]
    for ours, (w, _, _) in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.detach().double(), w, rtol=1e-5, atol=1e-6)


def reference(
    state: tuple[torch.Tensor, ...], G: torch.Tensor, step: int, cautious: bool
) -> tuple[torch.Tensor, ...]:
    w, m, v = state
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "rate": 1e-2 * 0.1}
    return adamw_step(w, G, m, v, step, **options, cautious=cautious)
