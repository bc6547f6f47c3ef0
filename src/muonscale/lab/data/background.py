"""A process that prepares a corpus while another trains on it; as a program, that process.

Its first line of input is the corpus. It prints what `prepare` reports, and an error, as lines of
JSON. It ends with the process that started it, and what it has done is kept for the next.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any

from muonscale.errors import MuonscaleError
from muonscale.lab.config.sections import DataSection
from muonscale.lab.data.encode_chunk import end_with_parent

ERROR = "error"

Report = tuple[str, int, int | None]


class BackgroundPreparation:
    """A process that prepares a corpus.

    Args:
        data: the section of the corpus.
        seed: seed of the split.
        processes: as for `prepare`.
    """

    def __init__(self, data: DataSection, seed: int, processes: int | None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "muonscale.lab.data.background"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the run, which stops this process in its time
        )
        weakref.finalize(self, self._process.kill)
        assert self._process.stdin is not None
        given = {"data": data.model_dump(mode="json"), "seed": seed, "processes": processes}
        self._process.stdin.write(json.dumps(given | {"parent": os.getpid()}) + "\n")
        self._process.stdin.flush()
        self._reports: deque[Report] = deque(maxlen=64)
        self._error = ""
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            stage, *rest = json.loads(line)
            if stage == ERROR:
                self._error = rest[0]
            else:
                self._reports.append((stage, *rest))

    @property
    def is_running(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    def reports(self) -> Iterator[Report]:
        """Yield what was reported since the last call."""
        while self._reports:
            yield self._reports.popleft()

    @property
    def error(self) -> str:
        """Why the process ended before it had finished."""
        return self._error or f"the process ended with code {self._process.poll()}"

    def stop(self) -> bool:
        """End the process, and return whether it was still running."""
        running = self.is_running
        self._process.kill()
        self._process.wait()
        return running


def main() -> None:
    """Prepare the corpus that the standard input names."""
    from muonscale.lab.data.prepare import prepare

    given = json.loads(sys.stdin.readline())
    threading.Thread(target=end_with_parent, args=(given["parent"],), daemon=True).start()

    def say(*report: Any) -> None:
        print(json.dumps(report), flush=True)

    data = DataSection.model_validate(given["data"])
    try:
        prepare(data, seed=given["seed"], report=say, processes=given["processes"])
    except MuonscaleError as error:
        say(ERROR, str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
