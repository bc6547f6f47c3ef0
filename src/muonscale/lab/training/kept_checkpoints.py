"""Which steps have checkpoints that are kept for good: a function of the configuration alone."""

from __future__ import annotations

from muonscale.errors import ConfigError
from muonscale.lab.config.load import Config


def kept_steps(config: Config) -> set[int]:
    """Return the steps of a run whose checkpoints are kept for good: the first after every mark.

    Raises:
        ConfigError: naming a mark beyond the end of the run.
    """
    timeline = config.timeline
    total = timeline.tokens_before(timeline.steps)
    for mark in config.checkpoint.marks:
        if mark > total:
            raise ConfigError(
                f"checkpoint.marks: {mark:,g} tokens are beyond the end of the run, which has "
                f"{total:,}; accepted: fractions of it below 1, or tokens from 1 up to its end"
            )
    return {max(1, timeline.step_at(mark)) for mark in config.checkpoint.marks}
