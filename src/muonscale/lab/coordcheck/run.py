"""Trains a model at several widths for a few steps and measures its coordinates in between."""

from __future__ import annotations

import time
from collections.abc import Callable
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
from muonscale.lab.training.setup import (
    build_state,
    model_shape,
    prepare_once,
    resolve_device,
    shared_tokenizer,
)
from muonscale.lab.training.step import train_step
from muonscale.transfer.constants import known_constants
from muonscale.transfer.coordinates import Coordinate, CoordinateProbe

PROBE_SEQUENCES = 4
"""The probe has at most this many sequences; no step is trained on them."""


@dataclass(frozen=True)
class CheckMeasurement:
    """The coordinates of all runs of a check."""

    plan: CheckPlan
    values: dict[Coordinate, np.ndarray]
    """float64 `[seeds, widths, steps + 1]`; NaN where there is no coordinate (changes and updates
    before the first step)."""
    rules: dict[str, str]
    """The rule of every parameter, module and of the logits, by the names that `by_place` gives."""
    falls: dict[str, float]
    """How outputs of a matrix fall whose out/in falls, by the same names (`falling_outputs`)."""
    losses: np.ndarray
    """Losses before every step, `[seeds, widths, steps]`."""
    seconds: float
    """Wall time of training and measuring, without the preparation of data."""
    cpu_seconds: float
    """The same in CPU time of all threads."""


def measure(plan: CheckPlan, console: RunConsole) -> CheckMeasurement:
    """Train every width with every seed, and measure.

    The corpus is prepared in its cache. Nothing else is written.

    Args:
        plan: the result of `plan_check`.
        console: prints messages.

    Raises:
        MuonscaleError: as training would.
    """
    request, config = plan.request, plan.config
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    corpora = prepare_once(config, console, Processes())
    begun, busy = time.perf_counter(), time.process_time()
    size = request.seeds, len(plan.widths), request.steps
    coordinates: dict[Coordinate, np.ndarray] = {}
    losses = np.full(size, np.nan)
    rules: dict[str, str] = {}
    for number, width in enumerate(plan.widths):
        for seed in range(request.seeds):
            start = time.perf_counter()
            run = _Run(plan.at(width, seed), corpora)
            for step in range(request.steps + 1):
                if step > 0:
                    losses[seed, number, step - 1] = run.take_step(step - 1)
                for key, value in run.probe.measure().items():
                    if key not in coordinates:
                        coordinates[key] = np.full((*size[:2], size[2] + 1), np.nan)
                    coordinates[key][seed, number, step] = value
            rules = rules or by_place(run.state.model, run.rules)
            first, *_, last = losses[seed, number]
            console.log(
                f"width {width}, seed {seed}: loss {first:.3f} to {last:.3f}, "
                f"{time.perf_counter() - start:.1f} s"
            )
    seconds, cpu_seconds = time.perf_counter() - begun, time.process_time() - busy
    values = {key: coordinates[key] for key in sorted(coordinates)}
    narrow, wide = (
        meta_model(planned_shape(plan.at(width, 0))) for width in (plan.widths[0], plan.widths[-1])
    )
    falls = falling_outputs(narrow, wide, plan.widths[-1] / plan.widths[0])
    return CheckMeasurement(plan, values, rules, falls, losses, seconds, cpu_seconds)


class _Run:
    """One width with one seed, as `muonscale train` would begin it."""

    def __init__(self, config: Config, corpora: dict[str, Corpus]) -> None:
        self._config = config
        self._processes = Processes(device=resolve_device(config.run.device))
        shape = model_shape(config, shared_tokenizer(corpora))
        transfer = plan_transfer(config, shape)
        assert transfer is not None
        self.state = build_state(config, shape, self._processes, transfer)
        forward = self.state.forward
        self._batches = build_batches(config, corpora, self._processes)
        self.rules = {name: row.rule for name, row in transfer.rows.items()}
        unread = self._batches.at(config.steps - 1)[:PROBE_SEQUENCES]
        self.probe = CoordinateProbe(
            forward.model,
            probe_forward(forward, unread, config.data.has_chats),
            transfer=transfer,
            final_norm=known_constants(forward.model).final_norm,
            part=part_namer(forward.model),
        )

    def take_step(self, step: int) -> float:
        """Train a step and return the loss before it."""
        self.state.model.train()
        rows = self._batches.at(step)
        return train_step(self.state, rows, self._config, self._processes)["loss"]


def probe_forward(
    forward: Parallelized, rows: np.ndarray, marked: bool
) -> Callable[[], dict[tuple[str, str], Tensor]]:
    """Return a function that runs a model on a batch and returns logits and attention logits.

    Args:
        forward: the model.
        rows: token ids, int64 `[batch, length + 1]`, as training batches are.
        marked: whether the rows are of chats.
    """
    batch_BL = torch.from_numpy(rows).to(next(forward.model.parameters()).device)
    ids_BL, positions_BL = batch_BL[:, :-1], None
    if marked:
        unpacked = unpack(batch_BL)
        ids_BL, positions_BL = unpacked.inputs_BL, unpacked.positions_BL
    names = {module: name for name, module in attention_modules(forward.model).items()}

    def run() -> dict[tuple[str, str], Tensor]:
        logits: dict[tuple[str, str], Tensor] = {}

        def record(module: torch.nn.Module, attention: AttentionInputs) -> None:
            logits[SCORES, names[module]] = attention.logits()

        with forward.evaluation(), hook_attention(forward.model, record):
            logits[LOGITS, "logits"] = forward.logits(ids_BL, positions_BL)
        return logits

    return run
