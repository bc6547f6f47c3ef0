"""A Slurm of one node, from Debian's packages: see start.sh."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Slurm, running; missing packages are a failure, with the command that installs them."""
    folder = tmp_path_factory.mktemp("slurm")
    started = subprocess.run(
        [HERE / "start.sh", folder], capture_output=True, text=True, timeout=300
    )
    if started.returncode:
        pytest.fail(started.stderr, pytrace=False)
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    try:
        yield Cluster()
    finally:
        subprocess.run([HERE / "stop.sh", folder], timeout=300, check=True)
        del os.environ["SLURM_CONF"]
