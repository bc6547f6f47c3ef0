"""Processes with one thread each, joined in a gloo group, that all run one function."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 300
"""Seconds for one function."""


def run_on(ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what `function(*arguments)` returns on every rank.

    Forks, which hangs once this process has computed anything on more than one thread.

    Raises:
        RuntimeError: where a rank fails, with its traceback.
    """
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            work = (rank, ranks, store, theirs, function, arguments)
            processes.append(context.Process(target=_serve, args=work, daemon=True))
            processes[-1].start()
            pipes.append(ours)
        try:
            answers = [pipe.recv() if pipe.poll(TIMEOUT) else (False, "hangs") for pipe in pipes]
        finally:
            _end(processes)
    if failed := [f"rank {r}: {text}" for r, (fine, text) in enumerate(answers) if not fine]:
        raise RuntimeError("\n".join(failed))
    return [value for _, value in answers]


def _end(processes: list[Any]) -> None:
    for process in processes:
        process.join(5)
        process.kill()
        process.join()


def _serve(
    rank: int,
    ranks: int,
    store: str,
    pipe: Connection,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, ranks),
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=TIMEOUT / 2),
        )
        pipe.send((True, function(*arguments)))
        dist.destroy_process_group()
    except BaseException:
        pipe.send((False, traceback.format_exc()))
