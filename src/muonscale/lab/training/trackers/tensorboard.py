"""TensorBoard: event files in the run folder, written by torch.utils.tensorboard."""

from __future__ import annotations

import json

from muonscale.lab.training.trackers.records import TrackerStart


class TensorBoard:
    """Writes event files to `tensorboard/` in the run folder.

    When a run is resumed, its new file marks the steps after the checkpoint as void.
    """

    rewinds = True

    def __init__(self, start: TrackerStart) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = start.folder / "tensorboard"
        purge = start.step + 1 if start.known else None
        self._writer = SummaryWriter(str(self._folder), purge_step=purge)
        if not start.known:
            text = json.dumps(start.config, indent=2)
            self._writer.add_text("config", _verbatim(text), start.step)

    @property
    def place(self) -> str:
        """Folder of the event files."""
        return str(self._folder)

    def log(self, values: dict[str, float], step: int) -> None:
        """Write scalars and flush them, so that they survive a killed process."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def end(self, result: dict[str, float], sample: str, step: int) -> None:
        """Write the result as scalars `result/...`, and the sample as text."""
        self.log({f"result/{name}": value for name, value in result.items()}, step)
        self._writer.add_text("sample", _verbatim(sample), step)

    def close(self, *, finished: bool) -> None:
        """Close the file."""
        self._writer.close()


def _verbatim(text: str) -> str:
    """Return text as a verbatim block of Markdown."""
    return "\n".join(f"    {line}" for line in text.splitlines())
