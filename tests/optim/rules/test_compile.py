from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muonscale import Muon
from muonscale.optim.rules import base, muon
from tests.optim.compare import close


@pytest.fixture(autouse=True)
def nothing_compiled():
    base._compiled.cache_clear()
    yield
    base._compiled.cache_clear()
    torch.compiler.reset()


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"post_norm": "normuon", "scale": "rms_exact"},
    ],
)
def test_compiled_steps_equal_eager_ones(options) -> None:
    torch.manual_seed(0)
    start = torch.randn(2, 8, 24)
    results = []
    for compile in (False, "aot_eager"):
        parameters = [nn.Parameter(w.clone()) for w in start]
        optimizer = Muon(parameters, lr=0.1, ns_steps=2, **options, compile=compile)
        torch.manual_seed(1)
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = torch.randn(8, 24)
            optimizer.step()
        results.append((parameters, optimizer))
    (eager, first), (compiled, second) = results
    for mine, other in zip(eager, compiled, strict=True):
        close(mine.detach(), other.detach())
        for key, value in first.state[mine].items():
            close(value, second.state[other][key])
    assert base._compiled.cache_info().currsize == 1  # of both parameters


def test_no_number_of_shapes_reaches_the_recompile_limit(monkeypatch) -> None:
    """Ten shapes, more than torch's limit of eight, of which each is compiled once."""
    # Newton-Schulz takes dynamo seconds per shape, and is not what this is about
    monkeypatch.setattr(muon, "orthogonalize", lambda X_NMK, *_, **__: X_NMK / X_NMK.norm())
    graphs: list[int] = []

    def counting(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        graphs.append(len(inputs))
        return graph.forward

    torch._dynamo.register_backend(counting, name="counting")
    limit = torch._dynamo.config.recompile_limit
    assert limit < 10
    parameters = [nn.Parameter(torch.randn(2, 2 + k)) for k in range(10)]
    optimizer = Muon(parameters, lr=0.1, compile="counting")
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert len(graphs) == 10
    optimizer.step()
    assert len(graphs) == 10
    assert torch._dynamo.config.recompile_limit == limit


def _steps(wrap: Callable[[Callable[[], Any]], Callable[[], Any]]) -> tuple[Tensor, int]:
    """Return a weight after three steps that `wrap` was given, and the number of graphs of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 4))
    optimizer = Muon(model, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)  # patches `step`
    torch._dynamo.utils.counters.clear()
    step = wrap(optimizer.step)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.eye(8)).square().sum().backward()
        step()
        scheduler.step()
    weight = model[0].weight
    assert isinstance(weight, Tensor)
    return weight.detach(), torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.filterwarnings("ignore")
def test_a_step_inside_torch_compile_runs_eagerly() -> None:
    expected, _ = _steps(lambda step: step)
    weight, graphs = _steps(lambda step: torch.compile(step, backend="eager"))
    assert torch.equal(weight, expected)
    assert graphs <= 1
    weight, graphs = _steps(lambda step: torch.compile(lambda: step(), backend="eager"))
    assert torch.equal(weight, expected)
    assert graphs <= 1
