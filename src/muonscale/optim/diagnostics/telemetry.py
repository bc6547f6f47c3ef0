"""What weights and updates look like: lengths, and the spread of their singular values.

The functions of a spectrum take squared singular values `[..., n]`, which `squared_singular_values`
gives; all of them are batched and stay on the device. `snapshot` before a step and `measure` after
it give the same figures for the parameter groups of an optimizer. They read and never write.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from muonscale.optim.distributed.dtensor import gather_full
from muonscale.optim.matrices.spec import PLAIN, MatrixSpec, matrix_shapes, view
from muonscale.optim.parameters.groups import MATRIX_ROLES
from muonscale.optim.rules.base import rule_of
from muonscale.optim.rules.decay import decay_rate
from muonscale.optim.rules.step_inputs import named

Group = Mapping[str, Any]

Place = tuple[str, int]
"""Matrices of a parameter: its name, and which batch of `matrices.view`."""


def rms(tensors: Iterable[Tensor]) -> Tensor:
    """Return the root mean square over all elements of all tensors, a 0-D tensor."""
    norms: list[Tensor] = []
    elements = 0
    for tensor in tensors:  # one at a time: they may be made on the way
        norms.append(torch.linalg.vector_norm(tensor.float()))
        elements += tensor.numel()
    return torch.linalg.vector_norm(torch.stack(norms)) / math.sqrt(max(1, elements))


def squared_singular_values(X: Tensor) -> Tensor:
    """Return the squared singular values of matrices `[..., out, in]`, rising, `[..., min(out, in)]`.

    Eigenvalues of the smaller Gram matrix, in float32 (float64 for float64): each is right to about
    1e-7 times the largest, which is enough for sums and the largest, and much cheaper than an SVD.
    """
    X = X.to(torch.promote_types(X.dtype, torch.float32))
    gram = X @ X.mT if X.shape[-2] <= X.shape[-1] else X.mT @ X
    return torch.linalg.eigvalsh(gram).clamp_min(0)


def svd_entropy(squares: Tensor) -> Tensor:
    """Return how evenly the energy is spread over the singular values, from 0 to 1.

        H = -(1/log n) * sum_i q_i log q_i        q_i = s_i^2 / sum_j s_j^2

    1 for a multiple of an orthogonal matrix and for a single row or column, 0 for a matrix of rank
    one and for zeros.

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
    """Return `||X||_F^2 / ||X||_2^2` of `[..., n]` squared singular values: from 1 to n, 0 for zeros."""
    largest = squares.amax(-1)
    return squares.sum(-1) / torch.where(largest > 0, largest, 1.0)


def spectral_norm(squares: Tensor) -> Tensor:
    """Return the largest singular value of `[..., n]` squared ones."""
    return squares.amax(-1).sqrt()


def orthogonality_error(squares: Tensor) -> Tensor:
    """Return how far a matrix is from a multiple of one with orthonormal rows or columns.

        E = ||X X^T / c - I||_F / sqrt(n)        c = ||X||_F^2 / n, for out <= in

    0 for such a multiple, whatever it is; sqrt(n - 1) for rank one; 1 for zeros.

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
"""What is said of a spectrum, by name."""


def applied_update(
    before: Tensor, after: Tensor, *, lr: float, rate: float = 0.0, cautious: bool = False
) -> Tensor:
    """Return U of the step `W <- W - rate*W - lr*U`: what was applied, weight decay excluded.

    Exact but for the rounding of the weights, which is coarse for 16-bit ones. Zeros where nothing
    has changed: a parameter without a gradient, a step left out.

    Args:
        before: W before the step, any shape.
        after: W after it.
        lr: learning rate of the step, above 0.
        rate: part of W that decay took away.
        cautious: whether it did so only where `W*U >= 0`. There the change has the sign of W, so
            that the places are known.
    """
    dtype = torch.promote_types(before.dtype, torch.float32)
    before, after = before.to(dtype), after.to(dtype)
    change = before - after
    decayed = before * rate * change.any()  # a step that was left out did not decay either
    if cautious:
        decayed = decayed * (change * before >= 0)
    return (change - decayed) / lr


def snapshot(groups: Iterable[Group]) -> dict[str, Tensor]:
    """Return a copy of every parameter of an optimizer's groups, by name: call it before a step.

    Of a sharded one, of the part that is here.
    """
    return {
        name: parameter.detach().clone() for group in groups for name, parameter in named(group)
    }


@torch.no_grad()
def measure(
    groups: Iterable[Group], before: Mapping[str, Tensor], *, matrices: int = 8
) -> dict[str, dict[str, float]]:
    """Return, by group name, figures of the last step's update and of the weights after it.

    Lengths are of all parameters of a group: `update_rms` (of U, in units of lr, decay excluded),
    `weight_rms`, `update_to_weight` (what one step changes, `lr*update_rms/weight_rms`). Spectra are
    averages over single matrices: `matrices` of a group's, spread evenly over them and the same at
    every call, for groups that are hidden matrices or routers or on Muon. They are called
    `update_...` and `weight_...` with the names of `SPECTRUM`, and `measured` is their number.
    A group whose lr was 0 has no figures of an update. Sharded parameters are gathered, one at a
    time: a collective of their ranks.

    Args:
        groups: an optimizer's, whose `lr` is that of the step.
        before: what `snapshot` returned.
        matrices: how many matrices of a group have their spectrum taken; 0 for none.
    """
    return {group["name"]: _measure_group(group, before, matrices) for group in groups}


def _measure_group(group: Group, before: Mapping[str, Tensor], matrices: int) -> dict[str, float]:
    weights = {name: parameter.detach() for name, parameter in named(group)}
    chosen = _sample(group, weights, matrices)

    def weight(name: str) -> Tensor:
        return gather_full(weights[name])

    figures: dict[str, Tensor | float] = {"weight_rms": rms(map(weight, weights))}
    figures |= _spectra("weight", chosen, weight, group)
    lr = float(group["lr"])
    if lr > 0:
        rate, cautious = decay_rate(group), bool(group["cautious_decay"])

        def update(name: str) -> Tensor:
            old, new = gather_full(before[name]), weight(name)
            return applied_update(old, new, lr=lr, rate=rate, cautious=cautious)

        figures["update_rms"] = rms(update(name) for name in weights)
        figures["update_to_weight"] = lr * figures["update_rms"] / figures["weight_rms"]
        figures |= _spectra("update", chosen, update, group)
    if chosen:
        figures["measured"] = sum(len(indices) for indices in chosen.values())
    return {name: float(value) for name, value in figures.items()}


def _sample(
    group: Group, weights: Mapping[str, Tensor], matrices: int
) -> dict[str, list[tuple[int, int]]]:
    """Return, by parameter name, (batch, index in it) of matrices spread evenly over a group's."""
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
    """Return `number` of the places (name, batch, index in the batch), spread evenly, by name."""
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
    """Return, by kind of matrix, means over single matrices, however these are grouped.

    `matrices` of a kind's, spread evenly over them and the same at every call, count alike: of each
    the RMS and the figures of `SPECTRUM`, of the weight (`weight_...`) and of the last step's update
    (`update_...`, in units of lr, decay excluded; none where an lr was 0). `measured` is their
    number. Sharded parameters are gathered, one at a time: a collective of their ranks.

    Args:
        groups: an optimizer's, whose `lr` is that of the step.
        before: what `snapshot` returned.
        kinds: matrices by kind.
        matrices: how many of a kind; 0 for none.
    """
    owners = {name: (group, p.detach()) for group in groups for name, p in named(group)}
    figures = {}
    for kind, members in kinds.items():
        places = [
            (name, batch, index)
            for name, batch in members
            for index in range(_shapes(owners[name][0], name, owners[name][1])[batch][0])
        ]
        seen: dict[str, list[Tensor]] = {}
        for name, indices in _spread(places, matrices).items():
            group, weight = owners[name]
            for what, X in _weight_and_update(name, group, weight, before).items():
                batches = view(X, _layout(group, name))
                seen.setdefault(what, []).extend(
                    _length_and_spectrum(batches[b][i]) for b, i in indices
                )
        if seen:
            means = {what: torch.stack(each).mean(0).tolist() for what, each in seen.items()}
            figures[kind] = {
                f"{what}_{name}": value
                for what, values in means.items()
                for name, value in zip(("rms", *SPECTRUM), values, strict=True)
            } | {"measured": len(seen["weight"])}
    return figures


def _weight_and_update(
    name: str, group: Group, weight: Tensor, before: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    whole, lr = gather_full(weight), float(group["lr"])
    if lr <= 0:
        return {"weight": whole}
    update = applied_update(
        gather_full(before[name]),
        whole,
        lr=lr,
        rate=decay_rate(group),
        cautious=bool(group["cautious_decay"]),
    )
    return {"weight": whole, "update": update}


def _length_and_spectrum(X: Tensor) -> Tensor:
    squares = squared_singular_values(X)
    return torch.stack([rms([X]), *(figure(squares) for figure in SPECTRUM.values())])


def _shapes(group: Group, name: str, parameter: Tensor) -> list[tuple[int, int, int]]:
    return matrix_shapes(parameter.shape, _layout(group, name))


def _spectra(
    what: str,
    chosen: Mapping[str, list[tuple[int, int]]],
    tensor: Callable[[str], Tensor],
    group: Group,
) -> dict[str, Tensor | float]:
    """Return the averages of `SPECTRUM` over the chosen matrices of `tensor(name)`."""
    seen = []
    for name, indices in chosen.items():
        batches = view(tensor(name), _layout(group, name))
        for batch, index in indices:
            squares = squared_singular_values(batches[batch][index])
            seen.append(torch.stack([figure(squares) for figure in SPECTRUM.values()]))
    if not seen:
        return {}
    return dict(
        zip((f"{what}_{name}" for name in SPECTRUM), torch.stack(seen).mean(0), strict=True)
    )


def _layout(group: Group, name: str) -> MatrixSpec:
    return group["matrices"].get(name, PLAIN)
