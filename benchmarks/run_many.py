"""Runs of `muonscale train` for the scripts beside this one: each once, two at a time, resumable."""

from __future__ import annotations

import math
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from scipy.stats import t as student

from muonscale.lab.run_folder import RunFolder


def train(commands: Iterable[Sequence[str]], *, at_once: int = 2) -> None:
    """Do what `muonscale WORDS` does for every list of words that names a run.path.

    A finished run is not run again, one that was stopped goes on. What runs say goes to files beside
    their folders.

    Raises:
        SystemExit: naming the first run that fails.
    """
    with ThreadPoolExecutor(at_once) as pool:
        for failed in pool.map(_run, commands):
            if failed is not None:
                raise SystemExit(failed)


def _run(words: Sequence[str]) -> str | None:
    path = next(Path(w.removeprefix("run.path=")) for w in words if w.startswith("run.path="))
    if RunFolder(path).result() is not None:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    log = path.parent / f"{path.name}.log"
    command = [sys.executable, "-m", "muonscale", *words, "--resume"]
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
    return None if code == 0 else f"{shlex.join(command)} ended with {code}, see {log}"


def interval(
    groups: Sequence[Sequence[float]], first: int, second: int
) -> tuple[float, float, int]:
    """Return a difference of means, half the width of its 90 % interval, and degrees of freedom.

    The variance over seeds is taken to be the same in all groups and pooled.

    Args:
        groups: figures of runs that differ in their seed, of several groups.
        first: number of the group ...
        second: ... and of the one that is subtracted.
    """
    freedom = sum(len(group) - 1 for group in groups)
    mean = [statistics.fmean(group) for group in groups]
    squares = sum((x - m) ** 2 for group, m in zip(groups, mean, strict=True) for x in group)
    error = math.sqrt(squares / freedom * sum(1 / len(groups[n]) for n in (first, second)))
    return mean[first] - mean[second], float(student.ppf(0.95, freedom)) * error, freedom


def paired(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Return the mean of paired differences and half the width of its 90 % interval."""
    pairs = [a - b for a, b in zip(one, other, strict=True)]
    error = statistics.stdev(pairs) / math.sqrt(len(pairs))
    return statistics.fmean(pairs), float(student.ppf(0.95, len(pairs) - 1)) * error


def verdict(difference: float, half: float) -> str:
    """Return a difference of losses, its interval, and what it says."""
    says = "not significantly different from zero"
    if abs(difference) > half:
        says = "lower" if difference < 0 else "higher"
    low, high = difference - half, difference + half
    return f"**{difference:+.4f} nats**, 90 % interval {low:+.4f} to {high:+.4f}: {says}"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
