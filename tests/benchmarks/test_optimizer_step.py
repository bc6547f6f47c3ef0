from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from muonscale.lab.bench import rates

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The benchmark's modules, as its command finds them."""
    monkeypatch.syspath_prepend(FOLDER)
    names = ("optimizer_step", "peers", "step_meter", "step_report")
    modules = {name: importlib.import_module(name) for name in names}
    monkeypatch.setattr(rates, "RATE_SECONDS", 0.0)
    return SimpleNamespace(**modules)


@pytest.fixture
def tiny(bench: SimpleNamespace) -> Any:
    shapes = ((2, 16, 16), (2, 24, 16), (1, 16, 40))
    return bench.step_meter.Workload(name="tiny", title="tiny", shapes=shapes, rounds=2)


@pytest.fixture
def sides(bench: SimpleNamespace) -> list[Any]:
    """Ours, the loop, and torch.optim.Muon in float32 (bfloat16 is slow on some machines)."""
    peers = bench.peers
    torch_side = next(peer for peer in peers.PEERS if peer.name == "torch.optim.Muon")
    return [*peers.own_sides(fast_bf16=False), *list(torch_side.sides())[1:]]


@pytest.fixture
def run(
    bench: SimpleNamespace, tiny: Any, sides: list[Any], monkeypatch: pytest.MonkeyPatch
) -> Callable[[Sequence[str]], None]:
    """The command, on the tiny workload."""
    monkeypatch.setattr(bench.optimizer_step, "WORKLOADS", (tiny,))
    monkeypatch.setattr(bench.optimizer_step, "all_sides", lambda fast_bf16: sides)
    return lambda argv: bench.optimizer_step.main([*argv, "--threads", "1"])


def broken(parameters: list[Parameter]) -> Any:
    raise ImportError("no such library")


def test_every_side_takes_the_update_of_its_own_coefficients(
    bench: SimpleNamespace, tiny: Any, sides: list[Any]
) -> None:
    rows = bench.step_meter.measure(tiny, sides, limit=60.0)["rows"]
    assert len(rows) == 3
    for row in rows.values():
        assert row["error"] < 1e-4
        assert row["state_bytes"] == 4 * tiny.numel
        assert row["seconds"]
    assert all(len(rows[side.name]["pairs"]) == 2 for side in sides[1:])


def test_products_are_counted(bench: SimpleNamespace, tiny: Any, sides: list[Any]) -> None:
    rows = bench.step_meter.measure(tiny, sides[1:2] + sides[:1], limit=60.0)["rows"]
    assert rows["addmm loop float32"]["flops"] == tiny.flops


def test_an_update_with_other_coefficients_is_called_another_one(
    bench: SimpleNamespace, tiny: Any, sides: list[Any]
) -> None:
    other = replace(sides[2], triples=bench.peers.YOU)
    row = bench.step_meter.measure(tiny, [sides[0], other], limit=60.0)["rows"][other.name]
    assert "another update" in bench.step_report.verdict(row, other)
    assert "another update" in bench.step_report.verdict(
        row, replace(other, products=torch.bfloat16)
    )


def test_a_peer_that_cannot_be_built_is_a_row_that_says_why(
    bench: SimpleNamespace, tiny: Any, sides: list[Any]
) -> None:
    sides[2] = replace(sides[2], build=broken)
    result = bench.step_meter.measure(tiny, sides, limit=60.0)
    text = "\n".join(bench.step_report.details(tiny, sides, result))
    assert f"| {sides[2].name} | float32 | failed: ImportError: no such library |" in text


def test_our_own_failure_is_not_swallowed(
    bench: SimpleNamespace, tiny: Any, sides: list[Any]
) -> None:
    with pytest.raises(ImportError):
        bench.step_meter.measure(tiny, [replace(sides[0], build=broken)], limit=60.0)


def test_a_side_beyond_the_limit_is_not_run_and_says_so(
    bench: SimpleNamespace, tiny: Any, sides: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = {torch.float32: 1e11, torch.bfloat16: 1e9}
    monkeypatch.setattr(bench.step_meter, "best_rate", rates.__getitem__)
    slow = replace(sides[2], products=torch.bfloat16, build=broken)
    row = bench.step_meter.measure(tiny, [*sides[:2], slow], limit=0.0)["rows"][slow.name]
    assert row["not_run"].startswith("not run: bfloat16 products at 1.0 GFLOP/s")


def test_every_peer_that_is_missing_says_so(bench: SimpleNamespace, tiny: Any) -> None:
    missing = [
        side
        for peer in bench.peers.PEERS
        if bench.peers.version_of(peer.package) == "not installed"
        for side in peer.sides()
    ]
    ours = list(bench.peers.own_sides(fast_bf16=False))
    rows = bench.step_meter.measure(tiny, [*ours, *missing], limit=1e9)["rows"]
    for side in missing:
        assert rows[side.name]["not_run"].startswith("failed: ModuleNotFoundError: No module named")


def test_gradients_are_whole_again_before_every_step(bench: SimpleNamespace, tiny: Any) -> None:
    matrices = bench.step_meter.MatrixSet(tiny)
    matrices.restore_gradients()
    before = [parameter.grad.clone() for parameter in matrices.parameters]
    for parameter in matrices.parameters:
        parameter.grad.zero_()
        parameter.grad = None
    matrices.restore_gradients()
    for parameter, gradient in zip(matrices.parameters, before, strict=True):
        assert torch.equal(parameter.grad, gradient)
    ranks = [torch.linalg.matrix_rank(gradient) for gradient in before]
    assert all(rank == min(g.shape) for rank, g in zip(ranks, before, strict=True))


def test_the_workloads_are_those_of_the_models(bench: SimpleNamespace) -> None:
    numel = {workload.name: workload.numel for workload in bench.optimizer_step.WORKLOADS}
    assert numel["llama-60m"] == 8 * (4 * 512**2 + 3 * 512 * 1376)
    assert numel["gpt2-small"] == 12 * 12 * 768**2
    experts = (64 + 2) * 3 * 352 * 512
    attention = (16 * 48 + 144 + 512) * 512 + 16 * 64 * 128
    assert numel["moonlight-moe"] == experts + attention + 64 * 512
    assert numel["thin"] == 64 * 64 * 1408


def test_a_finished_workload_is_not_measured_again(
    run: Callable[[Sequence[str]], None],
    bench: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run(["--out", str(tmp_path)])
    kept = (tmp_path / "optimizer_step.json").read_text(encoding="utf-8")
    text = (tmp_path / "optimizer_step.md").read_text(encoding="utf-8")
    run(["--out", str(tmp_path)])
    assert (tmp_path / "optimizer_step.json").read_text(encoding="utf-8") == kept
    assert (tmp_path / "optimizer_step.md").read_text(encoding="utf-8") == text
    monkeypatch.setattr(bench.optimizer_step, "sources", lambda: "changed")
    run(["--out", str(tmp_path)])
    again = json.loads((tmp_path / "optimizer_step.json").read_text(encoding="utf-8"))
    assert again["key"]["sources"] == "changed"
    assert again["workloads"] != json.loads(kept)["workloads"]


def test_a_quick_run_writes_nothing(
    run: Callable[[Sequence[str]], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(["--quick", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())
    assert "| torch.optim.Muon float32 | float32 |" in capsys.readouterr().out
