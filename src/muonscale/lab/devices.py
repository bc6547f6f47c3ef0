"""Rates and memory of devices, per process.

Peak rates are the vendors' values for dense products. Memory is the vendor's value in GB of 10^9
bytes. Bandwidths are per direction.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from muonscale.errors import ConfigError, nearest
from muonscale.optim.newton_schulz.orthogonalize import ns_dtype

GB = 10**9


@dataclass(frozen=True, kw_only=True)
class Device:
    """The device of one process."""

    name: str
    kind: str
    """Device type of torch: `cuda` (also for ROCm) or `cpu`."""
    flops: Mapping[str, float]
    """FLOP/s of matrix products, by dtype."""
    memory: int
    """Bytes of memory."""
    memory_bandwidth: float
    """Bytes per second between the processor and its memory."""
    intra: float
    """Bytes per second to the other processes of the machine."""
    inter: float
    """Bytes per second to other machines."""
    ranks_per_machine: int
    source: str
    """Source of the figures."""
    reported: str = ""
    """A pattern of the name that the driver reports. It matches no other model with the same letters
    and other rates (PCIe, NVL), and no part of a GPU (MIG)."""


def _gpu(
    name: str,
    flops: tuple[float, float, float],
    memory: int,
    bandwidth: float,
    intra: float,
    inter: float,
    source: str,
    reported: str,
) -> Device:
    """Return a GPU of a machine with eight; units are TFLOP/s of bf16, fp32, fp64; GB; GB/s."""
    dtypes = ("bfloat16", "float32", "float64")
    return Device(
        name=name,
        kind="cuda",
        flops={dtype: value * 1e12 for dtype, value in zip(dtypes, flops, strict=True)},
        memory=memory * GB,
        memory_bandwidth=bandwidth * GB,
        intra=intra * GB,
        inter=inter * GB,
        ranks_per_machine=8,
        source=source,
        reported=reported,
    )


GPUS = (
    _gpu("a100-80gb", (312, 19.5, 19.5), 80, 2039, 300, 25,
         "NVIDIA A100 80GB SXM data sheet", "A100-SXM4-80GB$"),
    _gpu("h100", (989, 67, 67), 80, 3350, 450, 50,
         "NVIDIA H100 SXM data sheet", "H100 80GB HBM3$"),
    _gpu("h200", (989, 67, 67), 141, 4800, 450, 50,
         "NVIDIA H200 SXM data sheet", "NVIDIA H200$"),
    _gpu("b200", (2250, 75, 37), 180, 8000, 900, 50,
         "NVIDIA HGX B200 data sheet, per GPU", "NVIDIA B200$"),
    _gpu("mi300x", (1307, 163.4, 163.4), 192, 5300, 448, 50,
         "AMD Instinct MI300X data sheet", "MI300X$"),
)  # fmt: skip
"""Links within a machine are NVLink or Infinity Fabric; between machines one 200 Gb/s (A100) or
400 Gb/s port per GPU, which is an assumption about the cluster."""


def recognize(name: str) -> Device | None:
    """Return the device that a driver reports under a name, None if its rates are not known."""
    return next((gpu for gpu in GPUS if re.search(gpu.reported, name)), None)


def this_cpu() -> Device:
    """Return this machine as the device of one process, with assumed rates of two server cores."""
    fast_bfloat16 = ns_dtype("cpu") == torch.bfloat16
    return Device(
        name="cpu",
        kind="cpu",
        flops={
            "float32": 1.2e11,
            "float64": 6e10,
            "bfloat16": 2.4e11 if fast_bfloat16 else 1e9,  # see `ns_dtype`
        },
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        memory_bandwidth=10 * GB,
        intra=2 * GB,
        inter=1.25 * GB,
        ranks_per_machine=1,
        source="this machine; rates assumed for two server cores",
    )


def find_device(name: str, *, inter: float | None = None) -> Device:
    """Return a device by name.

    Args:
        name: name of a device in `GPUS`, or `cpu`.
        inter: bytes per second of a process to other machines; that of the device by default.

    Raises:
        ConfigError: for an unknown one, with the nearest names.
    """
    known = {device.name: device for device in GPUS}
    if name != "cpu" and name not in known:
        raise ConfigError(f"unknown device {name!r}: {nearest(name, [*known, 'cpu'])}")
    device = this_cpu() if name == "cpu" else known[name]
    return device if inter is None else replace(device, inter=inter)
