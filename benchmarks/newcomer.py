"""The newcomer's path: every step of docs/tutorial.md from a wheel, in a new venv, in an empty folder.

    python benchmarks/newcomer.py [--folder FOLDER]

Builds the wheel, installs it with its `lab` and `eval` extras, runs the tutorial's commands in
order, and writes the time of each step into the tutorial. `tests/docs/test_tutorial.py` runs the
same steps with the project's own venv.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
TUTORIAL = ROOT / "docs" / "tutorial.md"
TABLE = re.compile(r"(?<=<!-- begin: times -->\n).*(?=<!-- end: times -->)", flags=re.S)
_PIECE = re.compile(
    r'^## ([^\n]+)$|^```(sh|python|yaml)(?: title="([^\n"]+)")?\n(.*?)^```', flags=re.M | re.S
)


@dataclass(frozen=True)
class Step:
    """A fenced block of the tutorial."""

    section: str
    language: str
    """sh and python are run, yaml is written to `file`."""
    text: str
    file: str | None


def steps_of(tutorial: str) -> Iterator[Step]:
    """Yield the blocks of a tutorial that a reader types or writes, in order."""
    section = ""
    for found in _PIECE.finditer(tutorial):
        title, language, file, text = found.groups()
        if title:
            section = title
        else:
            yield Step(section, language, text, file)


def follow(step: Step, folder: Path, python: Path) -> None:
    """Do what a step says, in a folder, with the commands of a venv.

    Raises:
        RuntimeError: if it fails, with what it wrote.
    """
    if step.language == "yaml":
        assert step.file is not None, f"a yaml block without a title: {step.text}"
        (folder / step.file).write_text(step.text, encoding="utf-8")
        return
    words = [str(python), "-"] if step.language == "python" else ["bash", "-e"]
    answer = subprocess.run(
        words,
        cwd=folder,
        env=_environment(folder, python),
        input=step.text,
        capture_output=True,
        text=True,
    )
    if answer.returncode or "Traceback" in answer.stderr:
        raise RuntimeError(f"{step.text}\n{answer.stdout}\n{answer.stderr}")


def _environment(folder: Path, python: Path) -> Mapping[str, str]:
    return {
        **{key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "MUONSCALE_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
    }


def installed(folder: Path) -> Path:
    """Return the Python of a new venv that has the wheel of this project and its extras."""
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", folder, ROOT], check=True)
    wheel = next(folder.glob("muonscale-*.whl"))
    extras = ["-c", ROOT / "constraints.txt", f"{wheel}[lab,eval]"]
    subprocess.run([*pip, "install", *extras], check=True)
    return python


def walk(folder: Path) -> dict[str, float]:
    """Take all steps in a folder; return the seconds of every section."""
    start = time.perf_counter()
    python = installed(folder)
    seconds = {"1. Install": time.perf_counter() - start}
    empty = folder / "empty"
    empty.mkdir()
    for step in steps_of(TUTORIAL.read_text(encoding="utf-8")):
        start = time.perf_counter()
        follow(step, empty, python)
        took = time.perf_counter() - start
        seconds[step.section] = seconds.get(step.section, 0.0) + took
        print(f"{took:6.1f} s  {step.section}: {step.text.splitlines()[0]}", flush=True)
    return seconds


def table(seconds: Mapping[str, float], load: float) -> str:
    """Return the times as Markdown."""
    rows = [f"| {section} | {took:.0f} |" for section, took in seconds.items()]
    return "\n".join(
        [
            "| step | seconds |",
            "|---|---|",
            *rows,
            f"| in all | {sum(seconds.values()):.0f} |",
            "",
            f"`python benchmarks/newcomer.py`: {os.cpu_count()} cores, load {load:.1f} before, from a wheel in a new venv",
            "in an empty folder. Installing took the wheels from a package index nearby, torch as its CPU build.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, help="work there and keep it")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    if arguments.folder is not None:
        arguments.folder.mkdir(parents=True)
        seconds = walk(arguments.folder)
    else:
        with tempfile.TemporaryDirectory() as folder:
            seconds = walk(Path(folder))
    text = TUTORIAL.read_text(encoding="utf-8")
    TUTORIAL.write_text(TABLE.sub(lambda _: table(seconds, load), text), encoding="utf-8")


if __name__ == "__main__":
    main()
