"""Trackio: a database in the folder of its dashboard, or a Hugging Face Space."""

from __future__ import annotations

import io
import os
from collections.abc import Generator
from contextlib import contextmanager, nullcontext, redirect_stdout

from muonscale.lab.training.trackers.records import TrackerStart

REMOTE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")
"""Environment variables that make Trackio log to another machine."""


class Trackio:
    """Logs to one run of Trackio, named by the run's name and id. A resumed run continues it."""

    rewinds = False

    def __init__(self, start: TrackerStart) -> None:
        import trackio

        self._trackio = trackio
        self._command = f'trackio show --project "{start.project}"'
        remote = start.mode != "offline" and any(os.environ.get(name) for name in REMOTE)
        with redirect_stdout(io.StringIO()), nullcontext() if remote else _without_network():
            self._run = trackio.init(
                project=start.project,
                name=f"{start.name}-{start.id}",
                config=start.config,
                resume="allow" if start.known else "never",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    @property
    def place(self) -> str:
        """Command that shows the run."""
        return self._command

    def log(self, values: dict[str, float], step: int) -> None:
        """Add a row of metrics."""
        self._run.log(dict(values), step=step)

    def end(self, result: dict[str, float], sample: str, step: int) -> None:
        """Add the result as `result/...`, and the sample as text."""
        values = {f"result/{name}": value for name, value in result.items()}
        self._run.log(
            {**values, "sample": self._trackio.Markdown(f"```\n{sample}\n```")}, step=step
        )

    def close(self, *, finished: bool) -> None:
        """Flush its queue."""
        with redirect_stdout(io.StringIO()):
            self._trackio.finish()


@contextmanager
def _without_network() -> Generator[None]:
    """Prevent Trackio from contacting the Hugging Face Hub and from logging to another machine."""
    from huggingface_hub import constants

    former = constants.HF_HUB_OFFLINE
    removed = {name: os.environ.pop(name) for name in REMOTE if name in os.environ}
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = former
        os.environ.update(removed)
