"""Measurements for a coordinate check: the sizes of a model's outputs, weights and updates.

With the right parametrization none of them depends on the width once training has begun. For
outputs see Yang et al., Tensor Programs V, arXiv 2203.03466, appendix D.1; for weights and updates
see A Spectral Condition for Feature Learning, arXiv 2310.17813, condition 1. A `CoordinateProbe`
measures one model.

Folds of a parametrization are divided out: the numbers are those of a model with these factors in
its forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from muonscale.errors import ConfigError
from muonscale.optim.distributed.dtensor import gather_full
from muonscale.optim.matrices.spec import view
from muonscale.optim.parameters.roles import Role, RoleAssignment, assign_roles
from muonscale.transfer.apply import Parametrization
from muonscale.transfer.pair import template

QuantityT = Literal["size", "change", "weight", "update"]
QUANTITIES: tuple[QuantityT, ...] = ("size", "change", "weight", "update")

RESIDUAL = "residual stream"
"""Role of the input of the final norm."""


class Coordinate(NamedTuple):
    """One number of a model that should not depend on its width."""

    quantity: QuantityT
    """`size` is the root mean square of an output, and `change` that of its change since the first
    measurement. `weight` and `update` are the norm (`parameter_norms`) of a parameter and of its
    change since the last measurement."""
    role: str
    """Part of the model: a result of `part`, `RESIDUAL`, or a role from the forward function."""
    name: str
    """Name of the module or parameter, with a star in place of every number."""


@dataclass(frozen=True)
class Site:
    """A module whose output or input is measured."""

    name: str
    module: nn.Module
    role: str
    """Part of the model."""
    fold: float = 1.0
    """Divisor of its output."""
    is_input: bool = False
    """Whether the input is measured."""


Outputs = dict[tuple[str, str], Tensor]
"""Outputs by role and name."""
Forward = Callable[[], Mapping[tuple[str, str], Tensor]]
"""Runs the model on the probe, and returns logits and other values that are no module's output."""

Part = Callable[[RoleAssignment], str]
"""Returns the part of a model that a parameter belongs to."""


def name_role(a: RoleAssignment) -> str:
    """Return the role of a parameter. Roles are the parts of any model."""
    return str(a.role)


def find_sites(
    model: nn.Module, transfer: Parametrization | None, final_norm: str, part: Part = name_role
) -> list[Site]:
    """Return the modules of a model whose outputs are measured.

    These are the modules that hold a matrix, except the head, and the final norm, whose input is
    the residual stream. The outputs of the head are the logits, which the forward function returns.

    Args:
        model: any module that `assign_roles` accepts.
        transfer: parametrization of the model; None if nothing was folded.
        final_norm: name of the norm before the head.
        part: returns the part of the model of a parameter.

    Raises:
        ConfigError: if the model has no module `final_norm`.
    """
    if final_norm not in dict(model.named_modules()):
        raise ConfigError(
            f"the model has no module {final_norm!r}: set the name of its final norm with "
            "ForwardConstants(final_norm=...)"
        )
    modules = dict(model.named_modules())
    found: dict[str, Site] = {}
    for a in assign_roles(model):
        owner = a.name.rpartition(".")[0]
        if a.role not in (Role.NORM, Role.HEAD) and owner not in found:
            # The fold of an embedding replaces a factor within its module, and other folds replace
            # factors after the module.
            fold = 1.0 if a.role == Role.EMBEDDING else fold_of(transfer, a.name)
            found[owner] = Site(owner, modules[owner], part(a), fold)
    return [*found.values(), Site(final_norm, modules[final_norm], RESIDUAL, is_input=True)]


def fold_of(transfer: Parametrization | None, name: str) -> float:
    """Return the product of the folds of a parameter."""
    return 1.0 if transfer is None else transfer.rows[name].fold


@contextmanager
def capture_outputs(places: Iterable[Site]) -> Generator[Outputs]:
    """Yield the outputs of modules that run in this block. The last call of a module counts."""
    outputs: Outputs = {}

    def hook(site: Site) -> Callable[..., None]:
        def keep(module: nn.Module, inputs: tuple[Any, ...], out: Any = None) -> None:
            tensor = _find_tensor(inputs if site.is_input else out)
            outputs[site.role, site.name] = tensor.detach().float() / site.fold

        return keep

    handles = [
        site.module.register_forward_pre_hook(hook(site))
        if site.is_input
        else site.module.register_forward_hook(hook(site))
        for site in places
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _find_tensor(value: Any) -> Tensor:
    """Return the first floating tensor among the inputs or outputs of a module."""
    if isinstance(value, Tensor):
        return value
    return next(v for v in value if isinstance(v, Tensor) and v.is_floating_point())


def rms(tensors: Sequence[Tensor]) -> float:
    """Return the root mean square over all elements of all tensors."""
    squares = sum(float(t.double().square().sum()) for t in tensors)
    return math.sqrt(squares / max(1, sum(t.numel() for t in tensors)))


def largest_singular_values(X_NMK: Tensor, *, vectors: int = 8, iterations: int = 12) -> Tensor:
    """Return the spectral norms `[N]` of matrices, by power iteration with several vectors.

    The result is a lower bound with an error of about two percent, and much cheaper than all
    singular values. The initial vectors are always the same. All norms are NaN if any element is
    not finite.
    """
    if not X_NMK.isfinite().all():
        return X_NMK.new_full((len(X_NMK),), math.nan)
    if X_NMK.shape[-2] < X_NMK.shape[-1]:
        X_NMK = X_NMK.mT
    short = X_NMK.shape[-1]
    generator = torch.Generator().manual_seed(0)
    V_KR = torch.randn(short, min(vectors, short), generator=generator, dtype=X_NMK.dtype)
    V_NKR = V_KR.to(X_NMK.device).expand(len(X_NMK), -1, -1)
    for _ in range(iterations):
        V_NKR = torch.linalg.qr(X_NMK.mT @ (X_NMK @ V_NKR)).Q
    return torch.linalg.matrix_norm(X_NMK @ V_NKR, ord=2)


def parameter_norms(X: Tensor, found: RoleAssignment) -> list[Tensor]:
    """Return norms of a parameter or its update. They are constant under the spectral condition.

    For each batch of logical matrices they are `[n]` spectral norms divided by sqrt(out/in). For
    embeddings and vectors, which do not sum over inputs, there is one root mean square `[1]`.
    """
    if found.matrices is None or found.role in (Role.EMBEDDING, Role.NORM):
        return [torch.tensor([rms([X])])]
    return [
        largest_singular_values(batch) / math.sqrt(batch.shape[-2] / batch.shape[-1])
        for batch in view(X, found.matrices)
    ]


class CoordinateProbe:
    """Measures the coordinates of one model while it trains.

    Args:
        model: model with its initial weights, on any device. It is not changed.
        forward: runs the model on the same inputs every time, without dropout.
        transfer: parametrization of the model; None if nothing was folded.
        final_norm: name of the norm before the head.
        part: returns the part of the model of a parameter.

    Examples:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.LayerNorm(8))
        >>> forward = lambda: {("out", "out"): net(torch.ones(2, 4))}
        >>> probe = CoordinateProbe(net, forward, final_norm="2")
        >>> sorted({key.quantity for key in probe.measure()})
        ['size', 'weight']
        >>> sorted({key.quantity for key in probe.measure()})
        ['change', 'size', 'update', 'weight']
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        *,
        transfer: Parametrization | None = None,
        final_norm: str,
        part: Part = name_role,
    ) -> None:
        self._forward, self._transfer, self._part = forward, transfer, part
        self._sites = find_sites(model, transfer, final_norm, part)
        self._parameters = [a for a in assign_roles(model) if a.parameter.requires_grad]
        self._before: dict[str, Tensor] | None = None
        self._first: Outputs | None = None

    @torch.no_grad()
    def measure(self) -> dict[Coordinate, float]:
        """Return the coordinates now. Changes and updates are included from the second call on."""
        found = self._measure_outputs() | self._measure_weights()
        return {key: found[key] for key in sorted(found)}

    def _measure_outputs(self) -> dict[Coordinate, float]:
        with capture_outputs(self._sites) as outputs:
            extra = self._forward()
        outputs |= {key: tensor.detach().float() for key, tensor in extra.items()}
        if missing := [s.name for s in self._sites if (s.role, s.name) not in outputs]:
            raise RuntimeError(f"{missing[0]} did not run in the forward pass of the probe")
        found = _combine_layers("size", outputs)
        if self._first is None:
            self._first = outputs
            return found
        first = self._first
        return found | _combine_layers(
            "change", {key: t - first[key] for key, t in outputs.items()}
        )

    def _measure_weights(self) -> dict[Coordinate, float]:
        now = {a.name: gather_full(a.parameter).detach().float() for a in self._parameters}
        found = self._measure_norms("weight", now)
        if self._before is not None:
            steps = {name: tensor - self._before[name] for name, tensor in now.items()}
            found |= self._measure_norms("update", steps)
        self._before = {name: tensor.clone() for name, tensor in now.items()}
        return found

    def _measure_norms(
        self, quantity: QuantityT, tensors: Mapping[str, Tensor]
    ) -> dict[Coordinate, float]:
        grouped: dict[Coordinate, list[Tensor]] = {}
        for a in self._parameters:
            if quantity == "weight" and a.role == Role.NORM:
                continue  # initially a gain is 1 and a bias 0 at every width
            batches = parameter_norms(tensors[a.name], a)
            for number, norms in enumerate(batches):
                place = f"[{number}]" if len(batches) > 1 else ""
                key = Coordinate(quantity, self._part(a), template(a.name) + place)
                grouped.setdefault(key, []).append(norms / fold_of(self._transfer, a.name))
        return {key: rms(norms) for key, norms in grouped.items()}


def _combine_layers(quantity: QuantityT, outputs: Outputs) -> dict[Coordinate, float]:
    grouped: dict[Coordinate, list[Tensor]] = {}
    for (role, name), tensor in outputs.items():
        grouped.setdefault(Coordinate(quantity, role, template(name)), []).append(tensor)
    return {key: rms(tensors) for key, tensors in grouped.items()}
