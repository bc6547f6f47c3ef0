from __future__ import annotations

import os

import pytest

from muonscale.errors import ConfigError
from muonscale.lab.devices import GPUS, find_device, recognize


def test_an_unknown_device_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"'h10'.*h100"):
        find_device("h10")


def test_a_bandwidth_replaces_the_one_between_machines_alone() -> None:
    usual, given = find_device("h100"), find_device("h100", inter=1e9)
    assert given.inter == 1e9 and usual.inter == 50e9
    assert given.intra == usual.intra


def test_the_cpu_has_the_memory_of_this_machine() -> None:
    assert find_device("cpu").memory == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize("device", GPUS, ids=lambda device: device.name)
def test_rates_of_gpus_are_in_order(device) -> None:
    assert device.flops["bfloat16"] > device.flops["float32"] >= device.flops["float64"]
    assert device.memory_bandwidth > device.intra > device.inter > 1e9
    assert 80e9 <= device.memory < 300e9


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("AMD Instinct MI300X", "mi300x"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA A100-PCIE-40GB", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_a_device_is_recognized_by_what_its_driver_reports(reported: str, name: str | None) -> None:
    found = recognize(reported)
    assert (found.name if found is not None else None) == name
