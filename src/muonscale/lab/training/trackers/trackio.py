"""Trackio: a database in its own folder, where its dashboard finds it, or a Hugging Face Space."""

from __future__ import annotations

import io
import os
from collections.abc import Generator
from contextlib import contextmanager, nullcontext, redirect_stdout

from muonscale.lab.training.trackers.records import Beginning

REMOTE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")
"""Variables by which Trackio logs to another machine."""


class Trackio:
    """Logs to one run of Trackio, called by the run's name and id, which stay when it is resumed."""

    rewinds = False

    def __init__(self, beginning: Beginning) -> None:
        import trackio

        self._trackio = trackio
        self._command = f'trackio show --project "{beginning.project}"'
        remote = beginning.mode != "offline" and any(os.environ.get(name) for name in REMOTE)
        with redirect_stdout(io.StringIO()), nullcontext() if remote else _without_network():
            self._run = trackio.init(
                project=beginning.project,
                name=f"{beginning.name}-{beginning.id}",
                config=beginning.config,
                resume="allow" if beginning.known else "never",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    @property
    def place(self) -> str:
        """The command that shows it."""
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
        """Write what is left in its queue."""
        with redirect_stdout(io.StringIO()):
            self._trackio.finish()


@contextmanager
def _without_network() -> Generator[None]:
    """Keep Trackio from asking the Hugging Face Hub who is logged in, and from logging elsewhere."""
    from huggingface_hub import constants

    former = constants.HF_HUB_OFFLINE
    elsewhere = {name: os.environ.pop(name) for name in REMOTE if name in os.environ}
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = former
        os.environ.update(elsewhere)
