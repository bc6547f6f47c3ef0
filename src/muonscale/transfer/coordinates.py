"""What a coordinate check looks at: how large a model's outputs, weights and updates are.

With the right parametrization none of these depends on the width, once training has begun
(Yang et al., Tensor Programs V, arXiv 2203.03466, appendix D.1, of outputs; A Spectral Condition for
Feature Learning, arXiv 2310.17813, condition 1, of weights and updates). A `CoordinateProbe` measures
one model; what is done with many widths is somebody else's.

What a parametrization has folded into a parameter is divided out again, so that the numbers are
those of the model with the factor in its forward pass.
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
"""The part of a model that the final norm is given."""


class Coordinate(NamedTuple):
    """One number of a model that should not depend on its width."""

    quantity: QuantityT
    """Of an output the `size` (root mean square) and its `change` since the first measurement; of a
    parameter the norm (`parameter_norms`) of the `weight` and of its `update` since the last one."""
    role: str
    """The part of the model: what `part` calls it, `RESIDUAL`, or what the forward pass gives."""
    name: str
    """Of the module or parameter, with a star for every number: all layers together."""


@dataclass(frozen=True)
class Site:
    """A module whose output is measured, or what it is given."""

    name: str
    module: nn.Module
    role: str
    """What the part of the model is called."""
    fold: float = 1.0
    """What its output is divided by."""
    incoming: bool = False


Outputs = dict[tuple[str, str], Tensor]
"""By role and name."""
Forward = Callable[[], Mapping[tuple[str, str], Tensor]]
"""Runs the model on the probe, and returns logits and whatever else no module puts out."""


Part = Callable[[RoleAssignment], str]
"""Names the part of a model that a parameter belongs to."""


def name_role(a: RoleAssignment) -> str:
    """Return the role of a parameter: the parts of any model."""
    return str(a.role)


def sites(
    model: nn.Module, transfer: Parametrization | None, final_norm: str, part: Part = name_role
) -> list[Site]:
    """Return the modules of a model whose outputs are measured.

    Those that hold a matrix, and the residual stream as the final norm is given it. The head is left
    out: its outputs are the logits, which the forward pass gives.

    Args:
        model: any module whose roles `assign_roles` finds.
        transfer: what was folded into its parameters; None for nothing.
        final_norm: name of the norm before the head.
        part: names the parts of the model.

    Raises:
        ConfigError: if there is no such norm.
    """
    if final_norm not in dict(model.named_modules()):
        raise ConfigError(
            f"the model has no module {final_norm!r}, which its final norm is said to be"
            "; give the name of one with ForwardConstants(final_norm=...)"
        )
    modules = dict(model.named_modules())
    found: dict[str, Site] = {}
    for a in assign_roles(model):
        owner = a.name.rpartition(".")[0]
        if a.role not in (Role.NORM, Role.HEAD) and owner not in found:
            # An embedding's fold makes up for a factor within its module; any other one for what
            # follows the module.
            fold = 1.0 if a.role == Role.EMBEDDING else fold_of(transfer, a.name)
            found[owner] = Site(owner, modules[owner], part(a), fold)
    return [*found.values(), Site(final_norm, modules[final_norm], RESIDUAL, incoming=True)]


def fold_of(transfer: Parametrization | None, name: str) -> float:
    """Return the product of what was folded into a parameter."""
    return 1.0 if transfer is None else transfer.rows[name].fold


@contextmanager
def capture_outputs(places: Iterable[Site]) -> Generator[Outputs]:
    """Collect the outputs of modules that run in this block; of one that runs often, the last."""
    outputs: Outputs = {}

    def hook(site: Site) -> Callable[..., None]:
        def keep(module: nn.Module, given: tuple[Any, ...], out: Any = None) -> None:
            tensor = _first(given if site.incoming else out)
            outputs[site.role, site.name] = tensor.detach().float() / site.fold

        return keep

    handles = [
        site.module.register_forward_pre_hook(hook(site))
        if site.incoming
        else site.module.register_forward_hook(hook(site))
        for site in places
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _first(value: Any) -> Tensor:
    """Return the first floating tensor of what a module takes or gives."""
    if isinstance(value, Tensor):
        return value
    return next(v for v in value if isinstance(v, Tensor) and v.is_floating_point())


def rms(tensors: Sequence[Tensor]) -> float:
    """Return the root mean square over all elements of all tensors."""
    squares = sum(float(t.double().square().sum()) for t in tensors)
    return math.sqrt(squares / max(1, sum(t.numel() for t in tensors)))


def largest_singular_values(X_NMK: Tensor, *, vectors: int = 8, iterations: int = 12) -> Tensor:
    """Return the spectral norms `[N]` of matrices, by power iteration with several vectors.

    From below and right to about two hundredths, which a slope over widths does not notice, and many
    times cheaper than all singular values. The first vectors are always the same. NaN where any
    element of the batch is not finite.
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
    """Return how large a parameter, or its update, is; width-free where it follows the spectral condition.

    For every batch of its logical matrices `[n]` spectral norms over sqrt(out/in); the root mean
    square of a table of embeddings and of a vector, whose inputs are single ones and not sums.
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
        model: at its first weights, on any device. It is never changed.
        forward: runs it on the same inputs every time, without dropout.
        transfer: its parametrization; None where nothing was folded in.
        final_norm: name of the norm before the head.
        part: names the parts of the model, which coordinates are sorted by.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.LayerNorm(8))
        >>> probe = CoordinateProbe(net, lambda: {("out", "out"): net(torch.ones(2, 4))}, final_norm="2")
        >>> sorted({key.quantity for key in probe.measure()}), len(probe.measure())
        (['size', 'weight'], 15)
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
        self._sites = sites(model, transfer, final_norm, part)
        self._parameters = [a for a in assign_roles(model) if a.parameter.requires_grad]
        self._before: dict[str, Tensor] | None = None
        self._first: Outputs | None = None

    @torch.no_grad()
    def measure(self) -> dict[Coordinate, float]:
        """Return the coordinates at the weights of now; changes and updates from the second time on."""
        found = self._of_outputs() | self._of_weights()
        return {key: found[key] for key in sorted(found)}

    def _of_outputs(self) -> dict[Coordinate, float]:
        with capture_outputs(self._sites) as outputs:
            extra = self._forward()
        outputs |= {key: tensor.detach().float() for key, tensor in extra.items()}
        if missing := [s.name for s in self._sites if (s.role, s.name) not in outputs]:
            raise RuntimeError(f"{missing[0]} did not run in the forward pass of the probe")
        found = _over_layers("size", outputs)
        if self._first is None:
            self._first = outputs
            return found
        first = self._first
        return found | _over_layers("change", {key: t - first[key] for key, t in outputs.items()})

    def _of_weights(self) -> dict[Coordinate, float]:
        now = {a.name: gather_full(a.parameter).detach().float() for a in self._parameters}
        found = self._norms("weight", now)
        if self._before is not None:
            steps = {name: tensor - self._before[name] for name, tensor in now.items()}
            found |= self._norms("update", steps)
        self._before = {name: tensor.clone() for name, tensor in now.items()}
        return found

    def _norms(self, quantity: QuantityT, tensors: Mapping[str, Tensor]) -> dict[Coordinate, float]:
        grouped: dict[Coordinate, list[Tensor]] = {}
        for a in self._parameters:
            if quantity == "weight" and a.role == Role.NORM:
                continue  # a gain is 1 and a bias 0 at first, at every width
            batches = parameter_norms(tensors[a.name], a)
            for number, norms in enumerate(batches):
                place = f"[{number}]" if len(batches) > 1 else ""
                key = Coordinate(quantity, self._part(a), template(a.name) + place)
                grouped.setdefault(key, []).append(norms / fold_of(self._transfer, a.name))
        return {key: rms(norms) for key, norms in grouped.items()}


def _over_layers(quantity: QuantityT, outputs: Outputs) -> dict[Coordinate, float]:
    grouped: dict[Coordinate, list[Tensor]] = {}
    for (role, name), tensor in outputs.items():
        grouped.setdefault(Coordinate(quantity, role, template(name)), []).append(tensor)
    return {key: rms(tensors) for key, tensors in grouped.items()}
