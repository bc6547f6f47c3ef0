"""Processes that wait for work, joined in a gloo group: a function of a test runs on all of them."""

from __future__ import annotations

import itertools
import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 90
"""Seconds for one function; a test that hangs fails after them."""


class World:
    """So many processes, forked from this one, with one thread each; every function has a new group."""

    def __init__(self, size: int) -> None:
        assert torch.get_num_threads() == 1, "a forked process with more threads hangs"
        self.size = size
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("fork")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            store = str(Path(self._folder.name) / "store")
            process = context.Process(target=_serve, args=(rank, size, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return what `function(*arguments)`, of a module, returns on every rank."""
        for pipe in self._pipes:
            _send(pipe, (function, arguments))
        answers = []
        for pipe in self._pipes:
            if not pipe.poll(TIMEOUT):
                self.close()
                answers.append((False, "has not answered"))
                break
            answers.append(_receive(pipe))
        if failed := [f"rank {r}:\n{text}" for r, (ok, text) in enumerate(answers) if not ok]:
            raise AssertionError("\n".join(failed))
        return [value for _, value in answers]

    @property
    def alive(self) -> bool:
        """Whether all processes are there."""
        return all(process.is_alive() for process in self._processes)

    def close(self) -> None:
        """Stop the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def _serve(rank: int, size: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    for number in itertools.count():
        try:
            function, arguments = _receive(pipe)
        except EOFError:
            return
        # Every group of gloo wakes a hundred times a second, also when nobody uses it. All ranks have
        # answered by now, so none is still connecting.
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(f"{store}-{number}", size),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=TIMEOUT / 2),
        )
        try:
            _send(pipe, (True, function(*arguments)))
        except BaseException:
            _send(pipe, (False, traceback.format_exc()))


def _send(pipe: Connection, value: object) -> None:
    """Send tensors by value: shared ones need a socket, whose path a long TMPDIR makes too long."""
    pipe.send_bytes(pickle.dumps(value))


def _receive(pipe: Connection) -> Any:
    return pickle.loads(pipe.recv_bytes())
