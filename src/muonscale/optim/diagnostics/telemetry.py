"""Statistics of weights and updates: their RMS and their singular values.

The functions of a spectrum take squared singular values `[..., n]` from `squared_singular_values`.
They are batched and stay on the device. `snapshot` before a step and `measure` after it compute the
figures for the parameter groups of an optimizer. Nothing is written to parameters or state.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from muonscale.optim.distributed.dtensor import gather_full
from muonscale.optim.matrices.spec import PLAIN, MatrixSpec, matrix_shapes, view
from muonscale.optim.parameters.groups import MATRIX_ROLES
from muonscale.optim.rules.base import rate_of, rule_of
from muonscale.optim.rules.step_inputs import named

Group = Mapping[str, Any]

Place = tuple[str, int]
"""The name of a parameter, and the index of a batch of its matrices in the result of `view`."""


def rms(tensors: Iterable[Tensor]) -> Tensor:
    """Return the root mean square over all elements of all tensors, 0-D."""
    norms: list[Tensor] = []
    elements = 0
    for tensor in tensors:  # one at a time, because an iterator may gather them
        norms.append(torch.linalg.vector_norm(tensor.float()))
        elements += tensor.numel()
    return torch.linalg.vector_norm(torch.stack(norms)) / math.sqrt(max(1, elements))


def squared_singular_values(X: Tensor) -> Tensor:
    """Return the squared singular values of `[..., out, in]`, ascending, as `[..., min(out, in)]`.

    They are the eigenvalues of the smaller Gram matrix in float32 (float64 for float64 `X`). Their
    error is about 1e-7 times the largest one. This is much faster than an SVD.
    """
    X = X.to(torch.promote_types(X.dtype, torch.float32))
    gram = X @ X.mT if X.shape[-2] <= X.shape[-1] else X.mT @ X
    return torch.linalg.eigvalsh(gram).clamp_min(0)


def svd_entropy(squares: Tensor) -> Tensor:
    """Return the normalized entropy of the squared singular values, from 0 to 1.

        H = -(1/log n) * sum_i q_i log q_i        q_i = s_i^2 / sum_j s_j^2

    It is 1 for a multiple of an orthogonal matrix and for a single row or column. It is 0 for other
    matrices of rank one and for zeros.

    Args:
        squares: squared singular values, `[..., n]`.

    References:
        Liu et al., Muon is Scalable for LLM Training, arXiv 2502.16982, section 3.4.
    """
    total = squares.sum(-1, keepdim=True)
    if squares.shape[-1] == 1:
        return (total > 0).to(squares.dtype).squeeze(-1)
    q = squares / torch.where(total > 0, total, 1.0)
    return torch.special.entr(q).sum(-1) / math.log(squares.shape[-1])


def stable_rank(squares: Tensor) -> Tensor:
    """Return `||X||_F^2 / ||X||_2^2` from `[..., n]` squared singular values; 0 for zeros."""
    largest = squares.amax(-1)
    return squares.sum(-1) / torch.where(largest > 0, largest, 1.0)


def spectral_norm(squares: Tensor) -> Tensor:
    """Return the largest singular value of `[..., n]` squared ones."""
    return squares.amax(-1).sqrt()


def orthogonality_error(squares: Tensor) -> Tensor:
    """Return the distance from a multiple of a matrix with orthonormal rows or columns.

        E = ||X X^T / c - I||_F / sqrt(n)        c = ||X||_F^2 / n, for out <= in

    It is 0 for any such multiple, sqrt(n - 1) for rank one and 1 for zeros.

    Args:
        squares: squared singular values, `[..., n]`.
    """
    mean = squares.mean(-1, keepdim=True)
    relative = squares / torch.where(mean > 0, mean, 1.0)
    return (relative - 1).square().mean(-1).sqrt()


SPECTRUM = {
    "svd_entropy": svd_entropy,
    "stable_rank": stable_rank,
    "spectral_norm": spectral_norm,
    "orthogonality_error": orthogonality_error,
}
"""Figures of a spectrum by name."""


def recover_update(
    before: Tensor, after: Tensor, *, lr: float, rate: float = 0.0, cautious: bool = False
) -> Tensor:
    """Return the update U of a step `W <- W - rate*W - lr*U`, without weight decay.

    It is exact except for the rounding of the weights, which is coarse in 16 bits. It is zero if
    the step did not change W.

    Args:
        before: W before the step, of any shape.
        after: W after the step.
        lr: learning rate of the step, above 0.
        rate: fraction of W that decay subtracted.
        cautious: whether decay was applied only where `W*U >= 0`. The change has the sign of W
            there.
    """
    dtype = torch.promote_types(before.dtype, torch.float32)
    before, after = before.to(dtype), after.to(dtype)
    change = before - after
    decayed = before * rate * change.any()  # a cancelled step did not decay either
    if cautious:
        decayed = decayed * (change * before >= 0)
    return (change - decayed) / lr


def snapshot(groups: Iterable[Group]) -> dict[str, Tensor]:
    """Return copies of the local parameters by name. Call it before a step."""
    return {
        name: parameter.detach().clone() for group in groups for name, parameter in named(group)
    }


@torch.no_grad()
def measure(
    groups: Iterable[Group], before: Mapping[str, Tensor], *, matrices: int = 8
) -> dict[str, dict[str, float]]:
    """Return figures of the last update and of the weights after it, by group name.

    Three figures are over all parameters of a group: `update_rms` (RMS of U, in units of lr,
    without decay), `weight_rms`, and `update_to_weight` (`lr*update_rms/weight_rms`). Figures of
    spectra are `update_` and `weight_` with the names in `SPECTRUM`, for groups of hidden matrices
    or routers and groups on Muon. They are means over a sample of matrices, spread evenly over the
    group and the same at every call. `measured` is the size of the sample. If the lr was 0, the
    figures of the update are missing. Sharded parameters are gathered one at a time: a collective
    of their ranks.

    Args:
        groups: parameter groups of the optimizer, with the `lr` of the step.
        before: result of `snapshot`.
        matrices: largest size of the sample of a group; 0 for none.
    """
    return {group["name"]: _measure_group(group, before, matrices) for group in groups}


def _measure_group(group: Group, before: Mapping[str, Tensor], matrices: int) -> dict[str, float]:
    weights = {name: parameter.detach() for name, parameter in named(group)}
    sample = _sample(group, weights, matrices)
    norms: defaultdict[str, list[Tensor]] = defaultdict(list)
    spectra: defaultdict[str, list[Tensor]] = defaultdict(list)
    for name, weight in weights.items():
        for what, X in _gather_weight_and_update(name, group, weight, before).items():
            norms[what].append(torch.linalg.vector_norm(X.float()))
            if name in sample:
                batches = view(X, _spec_of(group, name))
                spectra[what] += [
                    torch.stack(_measure_spectrum(batches[b][i])) for b, i in sample[name]
                ]
    root = math.sqrt(max(1, sum(weight.numel() for weight in weights.values())))
    figures: dict[str, Tensor | float] = {
        f"{what}_rms": torch.linalg.vector_norm(torch.stack(each)) / root
        for what, each in norms.items()
    }
    if "update_rms" in figures:
        figures["update_to_weight"] = (
            float(group["lr"]) * figures["update_rms"] / figures["weight_rms"]
        )
    for what, each in spectra.items():
        names = (f"{what}_{name}" for name in SPECTRUM)
        figures |= dict(zip(names, torch.stack(each).mean(0), strict=True))
    if sample:
        figures["measured"] = sum(len(indices) for indices in sample.values())
    return {name: float(value) for name, value in figures.items()}


def _sample(
    group: Group, weights: Mapping[str, Tensor], matrices: int
) -> dict[str, list[tuple[int, int]]]:
    """Return (batch, index in the batch) of a sample of a group's matrices, by parameter name."""
    if not rule_of(group).on_matrices and group.get("role") not in MATRIX_ROLES:
        return {}
    places = [
        (name, batch, index)
        for name, weight in weights.items()
        for batch, (number, _, _) in enumerate(_shapes(group, name, weight))
        for index in range(number)
    ]
    return _spread(places, matrices)


def _spread(places: list[tuple[str, int, int]], number: int) -> dict[str, list[tuple[int, int]]]:
    """Return (batch, index in the batch) of `number` evenly spread `places`, by parameter name."""
    count = min(number, len(places))
    chosen: dict[str, list[tuple[int, int]]] = {}
    for i in range(count):
        name, batch, index = places[(2 * i + 1) * len(places) // (2 * count)]
        chosen.setdefault(name, []).append((batch, index))
    return chosen


@torch.no_grad()
def measure_kinds(
    groups: Iterable[Group],
    before: Mapping[str, Tensor],
    kinds: Mapping[str, Sequence[Place]],
    *,
    matrices: int = 8,
) -> dict[str, dict[str, float]]:
    """Return means over a sample of matrices by kind of matrix, whatever groups they are in.

    The figures are the RMS and those in `SPECTRUM`, of the weight (`weight_...`) and of the last
    update (`update_...`, in units of lr, without decay; missing if the lr was 0). The sample is
    spread evenly over the matrices of a kind and is the same at every call. `measured` is its size.
    Sharded parameters are gathered one at a time: a collective of their ranks.

    Args:
        groups: parameter groups of the optimizer, with the `lr` of the step.
        before: result of `snapshot`.
        kinds: matrices by kind.
        matrices: largest size of the sample of a kind; 0 for none.
    """
    owners = {name: (group, p.detach()) for group in groups for name, p in named(group)}
    figures = {}
    for kind, members in kinds.items():
        places = [
            (name, batch, index)
            for name, batch in members
            for index in range(_shapes(owners[name][0], name, owners[name][1])[batch][0])
        ]
        found: dict[str, list[Tensor]] = {}
        for name, indices in _spread(places, matrices).items():
            group, weight = owners[name]
            for what, X in _gather_weight_and_update(name, group, weight, before).items():
                batches = view(X, _spec_of(group, name))
                found.setdefault(what, []).extend(
                    torch.stack([rms([X]), *_measure_spectrum(X)])
                    for X in (batches[b][i] for b, i in indices)
                )
        if found:
            means = {what: torch.stack(each).mean(0).tolist() for what, each in found.items()}
            figures[kind] = {
                f"{what}_{name}": value
                for what, values in means.items()
                for name, value in zip(("rms", *SPECTRUM), values, strict=True)
            } | {"measured": len(found["weight"])}
    return figures


def _gather_weight_and_update(
    name: str, group: Group, weight: Tensor, before: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    whole, lr = gather_full(weight), float(group["lr"])
    if lr <= 0:
        return {"weight": whole}
    update = recover_update(
        gather_full(before[name]),
        whole,
        lr=lr,
        rate=rate_of(group),
        cautious=bool(group["cautious_decay"]),
    )
    return {"weight": whole, "update": update}


def _measure_spectrum(X: Tensor) -> list[Tensor]:
    squares = squared_singular_values(X)
    return [figure(squares) for figure in SPECTRUM.values()]


def _shapes(group: Group, name: str, parameter: Tensor) -> list[tuple[int, int, int]]:
    return matrix_shapes(parameter.shape, _spec_of(group, name))


def _spec_of(group: Group, name: str) -> MatrixSpec:
    return group["matrices"].get(name, PLAIN)
