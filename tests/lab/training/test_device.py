"""Devices that this machine need not have; Apple's is only said to be there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from muonscale.errors import ConfigError
from muonscale.lab.config.load import load_config
from muonscale.lab.models.build import meta_model
from muonscale.lab.models.loss import row_losses
from muonscale.lab.parallel.processes import init_processes
from muonscale.lab.training.dry_run import planned_shape
from muonscale.lab.training.setup import (
    build_optimizer,
    check_mps,
    resolve_device,
    resolve_precision,
)

MPS = torch.device("mps")


def test_apples_gpu_is_taken_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("mps") == MPS
    assert resolve_device("auto") == torch.device("cpu")
    train = load_config("demo", ["run.device=mps"]).train
    assert resolve_precision(train, MPS) == torch.float32
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"run\.device=mps.*accepted: cpu, auto"):
        resolve_device("mps")


@pytest.mark.parametrize(
    ("recipe", "key", "said"),
    [
        ("demo", "optimizer.ns_dtype=float64", "ns_dtype=float64"),
        ("demo", "optimizer.pre_norm=row", "pre_norm"),
        ("demo", "optimizer.overrides={hidden: {pre_norm: row}}", "pre_norm"),
        ("demo", "optimizer.qk_clip=100", "qk_clip"),
        ("demo", "telemetry.attention_every=10", "attention_every"),
        ("demo", "telemetry.noise_scale_every=10", "noise_scale_every"),
        ("moonlight-nano", "run.seed=1", "mixture of experts"),
        ("demo", "run.seed=1", ""),
    ],
)
def test_what_needs_float64_is_refused_by_name(recipe: str, key: str, said: str) -> None:
    config = load_config(recipe, ["run.device=mps", key])
    model = meta_model(planned_shape(config))
    optimizer = build_optimizer(model, config.optimizer)
    if not said:
        check_mps(model, optimizer, config)
        return
    with pytest.raises(ConfigError, match=rf"{said}.*run\.device=mps"):
        check_mps(model, optimizer, config)


def test_it_is_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    section = load_config("demo", []).parallel
    with (
        pytest.raises(ConfigError, match=r"one process, not 2"),
        init_processes(section, MPS),
    ):
        pass


class NoFloat64(TorchDispatchMode):
    """Refuses float64, as Apple's GPUs do, but for what follows from tensors on the host."""

    host: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = any(id(leaf) in self.host for leaf in tree_leaves((args, kwargs)))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                assert known or leaf.dtype != torch.float64, func
                if known:
                    self.host.add(id(leaf))
        return out


def test_losses_are_summed_in_float64_on_the_host_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0))
    batch = np.arange(12).reshape(2, 6) % 11
    plain, _ = row_losses(lambda ids, places: logits, batch, torch.device("cpu"))
    to_host = torch.Tensor.cpu
    mode = NoFloat64()

    def cpu(tensor: torch.Tensor) -> torch.Tensor:
        there = to_host(tensor)
        mode.host.add(id(there))
        return there

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    with mode:
        again, targets = row_losses(lambda ids, places: logits, batch, torch.device("cpu"))
    assert (again == plain).all() and again.dtype == np.float64 and targets.tolist() == [5, 5]
