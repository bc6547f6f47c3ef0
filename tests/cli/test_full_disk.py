"""Files that cannot be written: every writer in turn fails, says where and how to go on."""

from __future__ import annotations

import resource
import shlex
import shutil
import signal
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import Muonscale

# Each limit stops another file: run.lock is empty, and model.safetensors is the largest.
LIMITS = (0, 100, 600, 1500, 3000, 6000, 12_000, 25_000, 100_000, 200_000, 260_000, 300_000)


@contextmanager
def at_most(size: int) -> Generator[None]:
    """Let no file be longer than so many bytes: every write fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    former = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, former)


def command_in(text: str) -> list[str]:
    """Return the words after `muonscale` of the command that a message ends with."""
    assert "with: muonscale " in text, text
    return shlex.split(text.rpartition("with: muonscale ")[2])


@pytest.mark.parametrize("limit", LIMITS)
def test_a_run(
    limit: int, muonscale: Muonscale, tiny: list[str], trained_once: Path, tmp_path: Path
) -> None:
    run = tmp_path / "a run"
    words = [*tiny, f"run.path={run}"]
    with at_most(limit):
        found = muonscale("train", *words)
    assert found.code in (0, 2) and "Traceback" not in found.err
    if found.code == 2:
        assert str(run) in found.err, found.err
        if (run / "config.json").exists():
            again = command_in(found.err)
            assert again == ["train", str(run), "--resume"]
            found = muonscale(*again)
        else:
            shutil.rmtree(run, ignore_errors=True)
            found = muonscale("train", *words)
    assert found.code == 0, found.err
    weights = "model/model.safetensors"
    assert (run / weights).read_bytes() == (trained_once / weights).read_bytes()
    assert not list(run.rglob(".*.tmp"))


@pytest.mark.parametrize("limit", [0, 100, 3000, 100_000])
def test_reading_commands(
    limit: int, muonscale: Muonscale, finished: Path, tiny: list[str], tmp_path: Path
) -> None:
    for words in (
        ["export", finished, tmp_path / "out"],
        ["report", finished, "--out", tmp_path / "report"],
        ["eval", finished, "--out", tmp_path / "eval"],
        ["train", *tiny, f"run.path={tmp_path / 'new'}", f"data.cache={tmp_path / 'cache'}"],
    ):
        with at_most(limit):
            found = muonscale(*words)
        assert found.code in (0, 2) and "Traceback" not in found.err
        if found.code == 2:
            assert str(tmp_path) in found.err, (words, found.err)


@pytest.mark.parametrize("limit", [0, 10_000])
def test_a_picture_is_whole_or_the_former_one(
    limit: int, muonscale: Muonscale, tmp_path: Path
) -> None:
    figure = tmp_path / "plan.png"
    figure.write_bytes(b"former")
    with at_most(limit):
        found = muonscale("plan", "llama-pico", "train.steps=10", "--figure", figure)
    assert found.code == 2 and str(figure) in found.err
    assert figure.read_bytes() == b"former" and list(tmp_path.iterdir()) == [figure]


def test_a_report_of_a_fit_names_its_own_option(muonscale: Muonscale, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    rows = [f"adamw,{10**n},{3 - 0.05 * n}" for n in range(15, 21)]
    table.write_text("\n".join(["optimizer,flops,loss", *rows]))
    words = ["fit", "scaling", table, "--law", "compute", "--resamples", "100"]
    with at_most(100):
        found = muonscale(*words, "--report", tmp_path / "page")
    assert found.code == 2 and "--report" in found.err and "--out" not in found.err
