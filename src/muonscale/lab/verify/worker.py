"""One process of a layout: `python -m muonscale.lab.verify.worker FOLDER`.

The folder holds the configuration and the number of steps. The first rank writes the trajectory
into it, and every rank that fails its reason.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from muonscale.errors import MuonscaleError
from muonscale.lab.config.load import Config, dump_config, load_config
from muonscale.lab.parallel.processes import init_processes
from muonscale.lab.run_folder import RunFolder
from muonscale.lab.training.console import RunConsole
from muonscale.lab.training.setup import resolve_device, set_up
from muonscale.lab.verify.trajectory import Trajectory, take_steps


def write_job(folder: Path, config: Config, steps: int) -> None:
    """Write the configuration and the number of steps for the workers."""
    (folder / "config.json").write_text(dump_config(config), encoding="utf-8")
    (folder / "steps.json").write_text(json.dumps(steps), encoding="utf-8")


def read_trajectory(folder: Path) -> Trajectory:
    """Return the trajectory that the workers wrote."""
    return Trajectory.load(folder / "trajectory.pt")


def read_reasons(folder: Path) -> dict[int, str]:
    """Return why ranks failed, by rank, in the order of their failures."""
    files = sorted(folder.glob("rank-*.txt"), key=lambda file: file.stat().st_mtime_ns)
    return {int(file.stem.removeprefix("rank-")): file.read_text("utf-8") for file in files}


def work(folder: Path) -> None:
    """Take the steps together with the other ranks."""
    config = load_config(str(folder / "config.json"))
    steps: int = json.loads((folder / "steps.json").read_text(encoding="utf-8"))
    with init_processes(config.parallel, resolve_device(config.run.device)) as processes:
        run = set_up(config, RunFolder(config.run.path), RunConsole.silent(), processes)
        trajectory = take_steps(run, steps)
        if processes.is_first:
            trajectory.save(folder / "trajectory.pt")


def main(folder: Path) -> int:
    """Return the exit code of a rank; if it fails, write the reason into the folder."""
    try:
        work(folder)
    except Exception as error:
        reason = " ".join(str(error).split())
        if not isinstance(error, MuonscaleError):
            reason = f"{type(error).__name__}: {reason}"
        (folder / f"rank-{os.environ['RANK']}.txt").write_text(reason, encoding="utf-8")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
