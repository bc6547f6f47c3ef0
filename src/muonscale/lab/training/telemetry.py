"""Telemetry of a run: how some steps changed the weights. Weights are read and not changed."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from muonscale.lab.config.sections import TelemetrySection
from muonscale.lab.models.matrix_kinds import matrix_kinds
from muonscale.lab.training.state import TrainState
from muonscale.optim.diagnostics.telemetry import measure, measure_kinds, snapshot


class StepTelemetry:
    """Measures one step, if `telemetry.every` makes it due.

    Args:
        state: the state of the run before the step.
        section: the section `telemetry`.
    """

    def __init__(self, state: TrainState, section: TelemetrySection) -> None:
        self._state, self._section = state, section
        self._due = section.every is not None and (state.step + 1) % section.every == 0
        self._before: dict[str, Tensor] = {}

    def before_update(self) -> None:
        """Copy the weights, if the step is due."""
        if self._due:
            self._before = snapshot(self._state.optimizer.param_groups)

    def record(self) -> dict[str, Any] | None:
        """Return the metrics record of the step after it was taken, or None if it was not due."""
        if not self._due:
            return None
        groups = self._state.optimizer.param_groups
        number, kinds = self._section.matrices, matrix_kinds(self._state.model, groups)
        return {
            "kind": "telemetry",
            "step": self._state.step,
            "groups": measure(groups, self._before, matrices=number),
            "matrices": measure_kinds(groups, self._before, kinds, matrices=number),
        }
