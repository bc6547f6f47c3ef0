"""Every worker of a study has a GPU of its own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from muonscale.lab.studies import gpus
from muonscale.lab.studies.config import ExecutorSection
from muonscale.lab.studies.execute import worker
from muonscale.lab.studies.execute.local import LocalPool

SAYS_ITS_GPU = """
import json, os, pathlib, sys, time
for line in sys.stdin:
    log = pathlib.Path(json.loads(line)["log"])
    log.write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
    while len(list(log.parent.iterdir())) < int(os.environ["AT_ONCE"]):
        time.sleep(0.01)
    print(0, flush=True)
"""


def run(workers: int, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list:
    monkeypatch.setattr(worker, "WORKER", ("-c", SAYS_ITS_GPU))
    monkeypatch.setenv("AT_ONCE", str(workers))
    jobs: list[Any] = [
        SimpleNamespace(id=str(n), files={"log": str(tmp_path / str(n))}) for n in range(workers)
    ]
    LocalPool(workers, 1, names).run(jobs, lambda _: None)
    return sorted(path.read_text() for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("workers", "names", "seen"),
    [(2, ["3", "5"], ["3", "5"]), (3, ["0", "1"], ["0", "0", "1"]), (2, [], ["all", "all"])],
)
def test_workers_have_one_gpu_each(
    workers: int, names: list[str], seen: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert run(workers, names, tmp_path, monkeypatch) == seen


@pytest.mark.parametrize(
    ("variable", "files", "found"),
    [
        (None, [], []),
        (None, ["nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"], ["0", "1"]),
        (None, ["nvidia6"], ["0"]),  # a container that has one of them
        ("", ["nvidia0"], []),
        ("-1", ["nvidia0"], []),
        ("2, 3", ["nvidia0"], ["2", "3"]),
        ("2,-1,3", ["nvidia0"], ["2"]),  # as CUDA takes it
        ("GPU-8932f937,MIG-1", [], ["GPU-8932f937", "MIG-1"]),
    ],
)
def test_gpus_are_found_and_give_the_number_of_workers(
    variable: str | None,
    files: list[str],
    found: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in files:
        (tmp_path / name).touch()
    monkeypatch.setattr(gpus, "DEVICES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert gpus.visible_gpus() == found
    runs = ExecutorSection().concurrent_runs
    assert runs == len(found) if found else runs is not None and runs >= 1
    assert ExecutorSection(workers=7).concurrent_runs == 7
    assert ExecutorSection(kind="inline").concurrent_runs == 1
