"""Trains a model at several widths for a few steps, and measures its coordinates in between."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from muonscale.lab.config.load import Config
from muonscale.lab.coordcheck.components import by_place, falling_outputs, part_namer
from muonscale.lab.coordcheck.plan import CheckPlan
from muonscale.lab.coordcheck.tolerances import LOGITS, SCORES
from muonscale.lab.data.loss_mask import unpack
from muonscale.lab.data.prepare import Corpus
from muonscale.lab.models.attention import AttentionInputs, attention_modules, hook_attention
from muonscale.lab.models.build import meta_model
from muonscale.lab.parallel.forward import Parallelized
from muonscale.lab.parallel.processes import Processes
from muonscale.lab.training.batches import build_batches
from muonscale.lab.training.console import RunConsole
from muonscale.lab.training.dry_run import planned_shape
from muonscale.lab.training.param_groups import plan_transfer
from muonscale.lab.training.router_balance import RouterBalance, plan_routing
from muonscale.lab.training.schedule import spans
from muonscale.lab.training.setup import (
    build_optimizer,
    build_parallelized,
    model_shape,
    prepare_once,
    resolve_device,
    shared_tokenizer,
)
from muonscale.lab.training.state import TrainState
from muonscale.lab.training.step import train_step
from muonscale.transfer.apply import Parametrization
from muonscale.transfer.constants import known_constants
from muonscale.transfer.coordinates import Coordinate, CoordinateProbe

PROBE_SEQUENCES = 4
"""At most so many are measured; no step is trained on them."""


@dataclass(frozen=True)
class Measured:
    """The coordinates of all runs of a check."""

    plan: CheckPlan
    values: dict[Coordinate, np.ndarray]
    """float64 `[seeds, widths, steps + 1]`; NaN where a coordinate is not measured (changes and updates
    before the first step)."""
    rules: dict[str, str]
    """Rule of every parameter, by its name with a star for every number, and of the module that has
    it, and of the logits."""
    falls: dict[str, float]
    """Likewise, how outputs of a matrix fall whose out/in does (`falling_outputs`)."""
    losses: np.ndarray
    """Before every step, `[seeds, widths, steps]`."""
    seconds: float
    """For training and measuring, the preparation of data left out, ..."""
    cpu_seconds: float
    """... and of all threads together, whatever else the machine did meanwhile."""


def measure(plan: CheckPlan, console: RunConsole) -> Measured:
    """Train every width with every seed, and measure.

    The corpus is prepared, in its cache; nothing else is written.

    Args:
        plan: from `plan_check`.
        console: where to say what happens.

    Raises:
        MuonscaleError: as training would.
    """
    asked, config = plan.asked, plan.config
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    corpora = prepare_once(config, console, Processes())
    begun, busy = time.perf_counter(), time.process_time()
    runs = {}
    for number, width in enumerate(plan.widths):
        for seed in range(asked.seeds):
            start = time.perf_counter()
            run = _Run(plan.at(width, seed), corpora)
            runs[seed, number] = run.take_steps(asked.steps)
            losses = runs[seed, number].losses
            console.log(
                f"width {width}, seed {seed}: loss {losses[0]:.3f} to {losses[-1]:.3f}, "
                f"{time.perf_counter() - start:.1f} s"
            )
    seconds = time.perf_counter() - begun, time.process_time() - busy
    return _gathered(plan, runs, *seconds)


@dataclass(frozen=True)
class _Trace:
    """One run."""

    coordinates: list[dict[Coordinate, float]]
    losses: list[float]
    rules: dict[str, str]


def _gathered(
    plan: CheckPlan, runs: Mapping[tuple[int, int], _Trace], seconds: float, cpu_seconds: float
) -> Measured:
    seeds, widths, steps = plan.asked.seeds, len(plan.widths), plan.asked.steps
    names = {key for trace in runs.values() for found in trace.coordinates for key in found}
    values = {key: np.full((seeds, widths, steps + 1), np.nan) for key in sorted(names)}
    losses = np.full((seeds, widths, steps), np.nan)
    for place, trace in runs.items():
        losses[place] = trace.losses
        for step, found in enumerate(trace.coordinates):
            for key, value in found.items():
                values[key][(*place, step)] = value
    narrow, wide = (
        meta_model(planned_shape(plan.at(w, 0))) for w in (plan.widths[0], plan.widths[-1])
    )
    falls = falling_outputs(narrow, wide, plan.widths[-1] / plan.widths[0])
    rules = next(iter(runs.values())).rules
    return Measured(plan, values, rules, falls, losses, seconds, cpu_seconds)


class _Run:
    """One width with one seed: a run as `muonscale train` would begin it."""

    def __init__(self, config: Config, corpora: dict[str, Corpus]) -> None:
        self._config = config
        self._processes = Processes(device=resolve_device(config.run.device))
        shape = model_shape(config, shared_tokenizer(corpora))
        transfer = plan_transfer(config, shape)
        assert transfer is not None
        forward = build_parallelized(config, shape, self._processes, None, transfer)
        optimizer = build_optimizer(forward.model, config.optimizer, transfer=transfer)
        stages = spans(config.schedule, config.timeline)
        routing = RouterBalance(forward.model, plan_routing(forward.model, config.routing, stages))
        self._state = TrainState(forward, optimizer, routing, {})
        self._batches = build_batches(config, corpora, self._processes)
        self._rules = {name: row.rule for name, row in transfer.rows.items()}
        self._probe = self._make_probe(forward, transfer)

    def _make_probe(self, forward: Parallelized, transfer: Parametrization) -> CoordinateProbe:
        unread = self._batches.at(self._config.steps - 1)[:PROBE_SEQUENCES]
        return CoordinateProbe(
            forward.model,
            probe_forward(forward, unread, self._config.data.has_chats),
            transfer=transfer,
            final_norm=known_constants(forward.model).final_norm,
            part=part_namer(forward.model),
        )

    def take_steps(self, steps: int) -> _Trace:
        """Train and measure: before the first step, and after each."""
        coordinates, losses = [self._probe.measure()], []
        self._state.model.train()
        for step in range(steps):
            rows = self._batches.at(step)
            record = train_step(self._state, rows, self._config, self._processes)
            losses.append(record["loss"])
            coordinates.append(self._probe.measure())
        return _Trace(coordinates, losses, by_place(self._state.model, self._rules))


def probe_forward(
    forward: Parallelized, rows: np.ndarray, marked: bool
) -> Callable[[], dict[tuple[str, str], Tensor]]:
    """Return what runs a model on a batch and gives its logits and attention logits.

    Args:
        forward: the model.
        rows: token ids, int64 `[batch, length + 1]`, as training batches are.
        marked: whether they are rows of chats.
    """
    batch_BL = torch.from_numpy(rows).to(next(forward.model.parameters()).device)
    ids_BL, positions_BL = batch_BL[:, :-1], None
    if marked:
        unpacked = unpack(batch_BL)
        ids_BL, positions_BL = unpacked.inputs_BL, unpacked.positions_BL
    names = {module: name for name, module in attention_modules(forward.model).items()}

    def run() -> dict[tuple[str, str], Tensor]:
        found: dict[tuple[str, str], Tensor] = {}

        def listen(module: torch.nn.Module, attention: AttentionInputs) -> None:
            found[SCORES, names[module]] = attention.logits()

        with forward.evaluation(), hook_attention(forward.model, listen):
            found[LOGITS, "logits"] = forward.logits(ids_BL, positions_BL)
        return found

    return run
