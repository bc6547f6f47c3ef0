"""Workers that fail or are stopped: the reason is told, and no process is left."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from muonscale.errors import MuonscaleError
from muonscale.lab.config.load import Config, load_config
from muonscale.lab.verify import launch

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "WORKER", "tests.lab.verify.failing")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{os.environ.get('PYTHONPATH', '')}")


def job(pids: Path) -> Config:
    return load_config("demo", [f"data.path={pids}"])


def assert_gone(pids: Path) -> None:
    numbers = [int(line) for line in pids.read_text().splitlines()]
    assert numbers
    for number in numbers:
        with pytest.raises(ProcessLookupError):
            os.kill(number, 0)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("killed", "rank 1 of 3 was killed by SIGKILL"),
        ("refused", "rank 1 of 3: a reason of its own"),
        pytest.param(
            "ended",
            "rank 1 of 3 ended with exit code 3: Oops: the last line",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_worker_that_dies_ends_all_with_its_rank_and_its_reason(
    how: str, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pids = tmp_path / how
    handlers = [signal.getsignal(number) for number in launch.SIGNALS]
    with pytest.raises(MuonscaleError) as caught:
        launch.take_steps_on(3, job(pids), 1)
    assert str(caught.value) == reason
    assert_gone(pids)
    assert [signal.getsignal(number) for number in launch.SIGNALS] == handlers
    assert not caplog.records


@pytest.mark.parametrize(
    ("signum", "error"),
    [
        pytest.param(signal.SIGINT, KeyboardInterrupt, marks=pytest.mark.slow),
        (signal.SIGTERM, SystemExit),
    ],
)
def test_a_signal_ends_the_workers(signum: int, error: type[BaseException], tmp_path: Path) -> None:
    pids = tmp_path / "waiting"

    def stop() -> None:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if pids.exists() and len(pids.read_text().splitlines()) == 2:
                os.kill(os.getpid(), signum)
                return
            time.sleep(0.01)

    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    with pytest.raises(error) as caught:
        launch.take_steps_on(2, job(pids), 1)
    thread.join()
    if isinstance(caught.value, SystemExit):
        assert caught.value.code == 128 + signum
    assert_gone(pids)
