"""Every example is run as its first lines say, and learns; those that resume do so exactly."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import muonscale

FOLDER = Path(__file__).parents[2] / "examples"
RESUMING = ["ddp", "fsdp2", "hf_trainer", "accelerate_ddp", "accelerate_fsdp2", "lightning_module"]
OTHERS = ["plain_pytorch", "trl_sft", "import_state"]
FALL = 1.5
"""By how many nats the loss has to fall from about 5.5."""


def run(name: str, *words: object, processes: int | None = None) -> tuple[list[float], str]:
    """Return the losses that an example prints, and all of its output."""
    script = FOLDER / f"{name}.py"
    text = script.read_text(encoding="utf-8")
    count = processes or (2 if "torchrun" in text else 0)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    done = subprocess.run(
        [sys.executable, *(launcher if count else []), str(script), *map(str, words)],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(muonscale.__file__).parents[1]),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = sorted(line for line in done.stdout.splitlines() if line.startswith("loss "))
    lines.sort(key=lambda line: line.partition("rank")[2])
    return [
        float(number) for line in lines for number in re.findall(r"\d+\.\d+", line)
    ], done.stdout


def test_every_example_is_short_and_run_here() -> None:
    found = {path.stem: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.py")}
    assert sorted(found) == sorted([*RESUMING, *OTHERS])
    for name, text in found.items():
        assert len(text.splitlines()) <= 40, name
        assert f"examples/{name}.py" in text.partition('"""')[2].partition('"""')[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_it_learns(name: str, tmp_path: Path) -> None:
    losses, _ = run(name, tmp_path / "run")
    assert losses[-1] < losses[0] - FALL


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMING)
def test_it_learns_and_goes_on_as_if_it_had_not_stopped(name: str, tmp_path: Path) -> None:
    whole, _ = run(name, tmp_path / "run")
    assert whole[1] < whole[0] - FALL
    resumed, _ = run(name, tmp_path / "run", "--resume")
    assert resumed[1::2] == whole[1::2]
    if name != "hf_trainer":  # whose log goes back to the first step
        assert resumed[0] < whole[0] - 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp2", "accelerate_fsdp2"])
def test_two_processes_are_continued_by_one(name: str, tmp_path: Path) -> None:
    """The loss is a mean: over all ranks with Accelerate, else of each rank, over equal parts."""
    whole, _ = run(name, tmp_path / "run")
    ends = whole[1::2]
    alone, _ = run(name, tmp_path / "run", "--resume", processes=1)
    assert alone[1] == pytest.approx(sum(ends) / len(ends), abs=2e-3)
