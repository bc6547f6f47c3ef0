"""Whether a measurement fits into memory, checked before anything is allocated."""

from __future__ import annotations

from pathlib import Path

import torch

from muonscale.errors import ConfigError
from muonscale.lab.console import bytes_text
from muonscale.lab.devices import this_cpu

FLOAT = 4
"""Bytes of a parameter, a gradient, or a value of state."""
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current"))


def free_bytes(device: torch.device) -> int:
    """Return the free bytes of the GPU, or of the machine within its container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    free = this_cpu().memory
    if meminfo.exists():
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    try:
        most, used = (path.read_text().strip() for path in LIMITS)
    except OSError:
        return free
    return free if most == "max" else min(free, int(most) - int(used))


def step_needs(elements: int, muon: int, workspace: int, *, torch_muon: bool) -> int:
    """Return the bytes of parameters, gradients, the states of all contenders, and a step.

    Args:
        elements: elements of the parameters.
        muon: how many of them are on Muon, which has one value of state for each instead of two.
        workspace: bytes of a step of ours.
        torch_muon: whether torch's Muon takes part, which needs the state of `muon` again.
    """
    ours = 2 * elements - muon
    values = 2 * elements + ours + 2 * elements + (muon if torch_muon else 0)
    return FLOAT * values + workspace


def check_memory(needed: int, device: torch.device, what: str, remedy: str) -> None:
    """Raise ConfigError if `needed` bytes are not free."""
    if needed > (free := free_bytes(device)):
        raise ConfigError(
            f"{what} needs about {bytes_text(needed)}, and {bytes_text(free)} are free on this "
            f"{'GPU' if device.type == 'cuda' else 'machine'}; {remedy}"
        )
