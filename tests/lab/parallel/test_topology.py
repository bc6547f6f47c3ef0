from __future__ import annotations

import pytest

from muonscale.errors import ConfigError
from muonscale.lab.config.sections import ParallelSection
from muonscale.lab.parallel.topology import Topology, arrange, parse_layout


@pytest.mark.parametrize(
    "text",
    ["fsdp=1", "fsdp=32,tp=2", "hsdp=2x8", "ddp=4", "tp=2,sp", "fsdp=8,ep=4", "hsdp=2x2,tp=2,sp"],
)
def test_a_layout_reads_as_it_is_written(text: str) -> None:
    assert str(parse_layout(text)) == text


@pytest.mark.parametrize(
    ("text", "replicas", "shards", "world"),
    [("fsdp=32,tp=2", 1, 32, 64), ("hsdp=2x8", 2, 8, 16), ("ddp=4", 4, 1, 4), ("tp=2", 1, 1, 2)],
)
def test_sizes_multiply_to_the_number_of_processes(
    text: str, replicas: int, shards: int, world: int
) -> None:
    topology = parse_layout(text)
    assert (topology.replicas, topology.shards, topology.world) == (replicas, shards, world)


REFUSED = [
    ("fdsp=2", "'fdsp=2' is not valid; accepted: fsdp=N"),
    ("fsdp=0", "not valid"),
    ("hsdp=4", "not valid"),
    ("", "not valid"),
    ("fsdp=2,fsdp=4", "gives fsdp twice"),
    ("fsdp=2,ddp=2", "both fsdp and ddp"),
    ("fsdp=2,sp", "needs tensor parallelism"),
    ("ddp=2,tp=2", "works with fsdp or hsdp, not with ddp"),
    ("fsdp=4,tp=2,ep=2", "exclude each other"),
    ("hsdp=2x2,ep=2", "works with fsdp or ddp, not with hsdp"),
    ("ddp=4,ep=2", "over all 4 ranks or none, not over 2"),
    ("fsdp=4,ep=3", "3 does not divide 4"),
]


@pytest.mark.parametrize(("text", "reason"), REFUSED)
def test_what_cannot_be_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parse_layout(text)


@pytest.mark.parametrize(
    ("section", "world", "machines", "expected"),
    [
        ({}, 8, 1, "fsdp=8"),
        ({"data": "ddp"}, 8, 2, "ddp=8"),
        ({"data": "hsdp"}, 16, 2, "hsdp=2x8"),
        ({"data": "hsdp", "replicas": 4}, 16, 2, "hsdp=4x4"),
        ({"tensor": 2, "sequence": True}, 8, 1, "fsdp=4,tp=2,sp"),
        ({"expert": 4}, 8, 1, "fsdp=8,ep=4"),
    ],
)
def test_the_processes_are_arranged_as_configured(
    section: dict[str, object], world: int, machines: int, expected: str
) -> None:
    assert str(arrange(ParallelSection.model_validate(section), world, machines)) == expected


@pytest.mark.parametrize(
    ("section", "world", "reason"),
    [
        ({"tensor": 3}, 4, "parallel.tensor=3 does not divide the 4 processes"),
        (
            {"replicas": 2},
            4,
            "parallel.replicas=2 is only for parallel.data=hsdp, not fsdp",
        ),
        ({"data": "hsdp", "replicas": 3}, 4, "parallel.replicas=3 does not divide 4"),
        ({"expert": 2}, 1, "does not divide 1"),
        ({"sequence": True}, 2, "needs tensor parallelism"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(
    section: dict[str, object], world: int, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        arrange(ParallelSection.model_validate(section), world)


def test_ranks_that_share_matrices_read_the_same_data() -> None:
    topology = Topology(data="hsdp", replicas=2, shards=2, tensor=2)
    assert [topology.data_rank(rank) for rank in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
