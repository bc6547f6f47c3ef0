from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.distributed.world import World


@pytest.fixture(scope="session")
def world() -> Iterator[Callable[[int], World]]:
    """`world(4)` is four processes, kept for all tests."""
    worlds: dict[int, World] = {}

    def of(size: int) -> World:
        if size not in worlds or not worlds[size].alive:
            worlds[size] = World(size)
        return worlds[size]

    yield of
    for one in worlds.values():
        one.close()
