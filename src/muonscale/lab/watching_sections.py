"""The sections of what is watched and kept of a run: evaluation, checkpoints, telemetry, profiles.

None of them changes what is learned.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from muonscale.errors import nearest
from muonscale.lab.sections import Mark, Positive, Section


class EvalSection(Section):
    """Held-out loss and the sample: `eval.*`."""

    every: Positive = 100
    """Steps between evaluations; the last step is always evaluated, on the whole held-out split."""
    tokens: Positive = 16384
    """Held-out tokens of an evaluation on the way."""
    batch_tokens: Positive = 8192
    """Tokens of one evaluation batch: bounds its memory."""
    prompt: str = ""
    """Start of the sample text written at the end."""
    sample_tokens: Annotated[int, Field(ge=0)] = 200
    """Length of the sample text; 0 for none."""


class CheckpointSection(Section):
    """What is kept to resume from and to export: `checkpoint.*`."""

    every: Positive = 100
    """Steps between checkpoints; one is always written at the end and on Ctrl-C or SIGTERM."""
    keep: Positive = 2
    """How many of the newest checkpoints stay on disk, those of `marks` not counted."""
    marks: list[Mark] = []
    """Checkpoints kept for good: after a fraction of the run's tokens below 1, after training tokens
    from 1. Each is written at the first step at or after it."""


class TelemetrySection(Section):
    """What is recorded of weights and updates besides their loss: `telemetry.*`."""

    every: Positive | None = None
    """Steps between records in metrics.jsonl; null for none. Each costs a copy of the parameters."""
    matrices: Annotated[int, Field(ge=0)] = 8
    """Matrices of each group whose singular values are taken, spread evenly over the group."""
    attention_every: Positive | None = None
    """Steps between records of the attention logits; null for none. Such a step computes them once
    more."""
    noise_scale_every: Positive | None = None
    """Steps between records of the gradient noise scale; null for none. Such a step has the memory of
    one more gradient, and ranks exchange gradients after every micro-batch."""

    def noise_scale_due(self, step: int) -> bool:
        """Return whether the noise scale is measured in a step, the first being step 0."""
        return self.noise_scale_every is not None and (step + 1) % self.noise_scale_every == 0


TRACKERS = ("tensorboard", "wandb", "trackio")


class TrackSection(Section):
    """Where a run is followed besides its folder: `track.*`; `track=wandb` sets `track.to`."""

    to: list[str] = []
    """Any of `tensorboard`, `wandb` and `trackio`; one needs no brackets, and `none` is none."""
    project: Annotated[str, Field(min_length=1)] = "muonscale"
    """Project of Weights & Biases and Trackio."""
    name: Annotated[str, Field(min_length=1)] | None = None
    """Name of the run there; that of its folder when not given."""
    mode: Literal["online", "offline"] | None = None
    """`offline`: nothing leaves this machine. When not given, Weights & Biases asks `WANDB_MODE`, else
    is online, and Trackio logs elsewhere only if one of its variables says so."""

    @field_validator("to", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        names = [] if value in (None, "none") else value
        names = [part.strip() for part in names.split(",")] if isinstance(names, str) else names
        if not isinstance(names, list):
            raise ValueError(f"track={value!r} is no list of trackers; {nearest('', TRACKERS)}")
        for name in names:
            if name not in TRACKERS:
                hint = nearest(name, [*TRACKERS, "none"])
                raise ValueError(f"track={name}: there is no such tracker; {hint}")
        return list(dict.fromkeys(names))


class ProfileSection(Section):
    """What is measured of the run itself: `profile.*`."""

    steps: str | None = None
    """Steps to profile, as `first:end` without the end: `10:15` is steps 10 to 14, counted as in
    metrics.jsonl. Null for none."""

    @field_validator("steps", mode="before")
    @classmethod
    def _range(cls, value: Any) -> Any:
        form = r"[1-9]\d*:[1-9]\d*"
        if value is not None and not (isinstance(value, str) and re.fullmatch(form, value)):
            raise ValueError(
                f"profile.steps={value!r} is no range of steps; accepted: first:end, such as 10:15 for "
                "steps 10 to 14"
            )
        return value

    @property
    def step_range(self) -> range:
        """The steps, the first being step 1; empty for none."""
        if self.steps is None:
            return range(0)
        first, end = map(int, self.steps.split(":"))
        return range(first, end)
