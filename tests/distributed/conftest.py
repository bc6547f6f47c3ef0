from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.distributed.world import World

SIZES = (1, 2, 3, 4, 6)
WORLDS: dict[int, World] = {}


def pytest_collection_finish(session: pytest.Session) -> None:
    """Fork the processes before any test runs autograd, if a test uses them.

    Where torch is built for CUDA, a process cannot use autograd if the one it was forked from has.
    """
    if any("world" in getattr(item, "fixturenames", ()) for item in session.items):
        WORLDS.update({size: World(size) for size in SIZES})


def pytest_sessionfinish() -> None:
    for world in WORLDS.values():
        world.close()


@pytest.fixture(scope="session")
def world() -> Callable[[int], World]:
    """`world(4)` is four processes, kept for all tests."""

    def of(size: int) -> World:
        if not WORLDS[size].alive:
            WORLDS[size].close()
            WORLDS[size] = World(size)
        return WORLDS[size]

    return of
