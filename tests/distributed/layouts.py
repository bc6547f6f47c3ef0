"""Every row of the layout table, as (mesh, placements of a parameter); and a model to put on them."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from muonscale import Muon
from muonscale.optim.matrices.spec import MatrixSpec


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    name: str
    mesh: tuple[int, ...]
    placements: Callable[[str, tuple[int, ...]], tuple[Placement, ...]]
    """Of a parameter, by its name and shape."""


def _fsdp(name: str, shape: tuple[int, ...]) -> tuple[Placement, ...]:
    return (Shard(0),)


def _hsdp(name: str, shape: tuple[int, ...]) -> tuple[Placement, ...]:
    return Replicate(), Shard(0)


def _columns(name: str, shape: tuple[int, ...]) -> tuple[Placement, ...]:
    return (Shard(1 if len(shape) == 4 else len(shape) - 1),)


def _tensor(name: str, shape: tuple[int, ...]) -> tuple[Placement, ...]:
    """Rows and columns in turn, as Megatron does; vectors on all ranks."""
    if len(shape) < 2:
        return (Replicate(),)
    first = 0 if len(shape) == 4 else len(shape) - 2
    return (Shard(zlib.crc32(name.encode()) % 2 + first),)


def _fsdp_over_tensor(name: str, shape: tuple[int, ...]) -> tuple[Placement, ...]:
    (inner,) = _tensor(name, shape)
    if isinstance(inner, Shard) and inner.dim == 0:
        return _StridedShard(0, split_factor=2), inner
    return Shard(0), inner


def _experts(name: str, shape: tuple[int, ...]) -> tuple[Placement, ...]:
    """Stacks on the expert axis, the rest whole everywhere."""
    return (Shard(0),) if len(shape) == 3 else (Replicate(),)


def _experts_and_fsdp(name: str, shape: tuple[int, ...]) -> tuple[Placement, ...]:
    return (Shard(0), Shard(1)) if len(shape) == 3 else (Shard(0), Shard(0))


def rows(size: int) -> list[Row]:
    """Return the rows of the table that `size` ranks can be."""
    table = [
        Row("fsdp", (size,), _fsdp),
        Row("columns", (size,), _columns),
        Row("tensor", (size,), _tensor),
        Row("experts", (size,), _experts),
    ]
    if size == 4:
        table += [
            Row("hsdp", (2, 2), _hsdp),
            Row("fsdp_tensor", (2, 2), _fsdp_over_tensor),
            Row("experts_fsdp", (2, 2), _experts_and_fsdp),
        ]
    return table


SHAPES: dict[str, tuple[tuple[int, ...], MatrixSpec]] = {
    "plain": ((16, 24), MatrixSpec()),
    "tall": ((40, 8), MatrixSpec()),
    "twin": ((16, 24), MatrixSpec()),
    "thin": ((2, 40), MatrixSpec()),
    "row": ((1, 12), MatrixSpec()),
    "odd": ((7, 9), MatrixSpec()),
    "fused": ((24, 12), MatrixSpec(splits=(12, 6, 6))),
    "heads": ((24, 12), MatrixSpec(splits=(12, 6, 6), heads=(2, 1, 1))),
    "out_heads": ((12, 16), MatrixSpec(heads=2, by_columns=True)),
    "column_heads": ((10, 12), MatrixSpec(heads=4, by_columns=True, interleaved=True)),
    "interleaved": ((24, 10), MatrixSpec(splits=(12, 6, 6), groups=3)),
    "conv1d": ((12, 30), MatrixSpec(transposed=True, splits=(10, 10, 10))),
    "experts": ((5, 12, 8), MatrixSpec(splits=(6, 6))),
    "latent": ((20, 12), MatrixSpec(splits=(12, 8), groups=4, heads=4)),
    "kernel": ((8, 6, 3, 3), MatrixSpec(flattened=True)),
    "grouped_kernel": ((8, 3, 3, 3), MatrixSpec(flattened=True, heads=2)),
    "back_kernel": (
        (8, 6, 2, 2), MatrixSpec(flattened=True, transposed=True, heads=2, by_columns=True)),
}  # fmt: skip
"""Stored shapes and matrices of the parameters on Muon."""

VECTORS: dict[str, tuple[int, ...]] = {"norm": (9,), "embedding": (11, 6)}
"""Shapes of those on AdamW."""

RULES: dict[str, dict[str, Any]] = {
    "muon": {},
    "muon_plus": {"post_norm": "row_col"},
    "normuon": {"post_norm": "normuon"},
    "muoneq": {"pre_norm": "row_col"},
    "muon2": {"second_moment": "gradient"},
    "adamuon": {"pre_norm": "sign", "second_moment": "update"},
    "aurora": {"pre_norm": "aurora"},
    "weight_norm": {"constraint": "weight_norm"},
    "radial_brake": {"constraint": "radial_brake", "cautious_decay": True},
    "dion2": {"row_fraction": 0.3, "nesterov": False},
    "muown": {"constraint": "row_magnitude"},
}


SIZES = (1, 2, 3, 4)
"""Numbers of processes."""
STEPS = 3
TOLERANCES = {"rtol": 1e-4, "atol": 2e-5}
"""Of parameters after so many steps, against those of one process."""


def whole(name: str, seed: int) -> Tensor:
    """Return a parameter or a gradient: full rank, the same in every process."""
    shape = SHAPES[name][0] if name in SHAPES else VECTORS[name]
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name}/{seed}".encode()))
    return torch.randn(shape, generator=generator)


def make(place: Callable[[str, Tensor], Tensor], **options: Any) -> tuple[dict[str, Any], Muon]:
    """Return the parameters, each put where `place` says, and their optimizer."""
    parameters = {
        name: torch.nn.Parameter(place(name, whole(name, 0))) for name in [*SHAPES, *VECTORS]
    }
    groups = [
        {
            "params": [parameters[name] for name in SHAPES],
            "param_names": list(SHAPES),
            "rule": "muon",
            "matrices": {name: matrices for name, (_, matrices) in SHAPES.items()},
        },
        {
            "params": [parameters[name] for name in VECTORS],
            "param_names": list(VECTORS),
            "rule": "adamw",
        },
    ]
    defaults = {"lr": 0.1, "weight_decay": 0.1, "ns_dtype": "float32"}
    return parameters, Muon(groups, **(defaults | options))


def reference(steps: int, first: int = 1, **options: Any) -> dict[str, Tensor]:
    """Return the parameters after `steps` on one process."""
    parameters, optimizer = make(lambda _, tensor: tensor, **options)
    for seed in range(first, first + steps):
        for name, parameter in parameters.items():
            parameter.grad = whole(name, seed)
        optimizer.step()
    return {name: parameter.detach() for name, parameter in parameters.items()}


def mesh_of(row: Row) -> DeviceMesh:
    """Return the row's mesh."""
    names = ("outer", "inner")[: len(row.mesh)]
    return init_device_mesh("cpu", row.mesh, mesh_dim_names=names)


def placed(row: Row, mesh: DeviceMesh) -> Callable[[str, Tensor], Tensor]:
    """Return the function that puts a parameter or gradient on the row's mesh."""

    def place(name: str, tensor: Tensor) -> Tensor:
        placements = row.placements(name, tuple(tensor.shape))
        return distribute_tensor(tensor, mesh, placements, src_data_rank=None)

    return place


def gathered(parameters: dict[str, Any]) -> dict[str, Tensor]:
    """Return whole tensors."""
    return {
        name: p.detach().full_tensor() if isinstance(p.detach(), DTensor) else p.detach().clone()
        for name, p in parameters.items()
    }
