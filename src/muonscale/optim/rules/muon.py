"""The Muon rule: momentum, pre-normalization, polar factor, post-normalization, shape factor.

Liu et al., Muon is Scalable for LLM Training, arXiv 2502.16982, equations 1, 2 and 4, with an
average in place of the sum. `M <- mu*M + (1-mu)*G` is (1-mu) times the paper's momentum, so the
polar factor is the same, and the buffer does not grow longer than a gradient.

Letters: G gradient, M momentum, N direction, O polar factor of N, U scaled update, V row state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor

from muonscale.errors import ConfigError
from muonscale.optim.matrices.batches import MatrixShape
from muonscale.optim.newton_schulz.coefficients import Coefficients, resolve
from muonscale.optim.newton_schulz.flops import Segments, accepted_segments, ns_flops
from muonscale.optim.newton_schulz.orthogonalize import (
    DTYPES,
    DTypeLike,
    orthogonalize,
    orthogonalize_part,
    resolve_dtype,
)
from muonscale.optim.newton_schulz.subgroup import Subgroup, SubgroupReducer, divided_axis
from muonscale.optim.options import MuonOptions, SecondMomentT, check_word
from muonscale.optim.rules.base import (
    Group,
    MatrixUpdate,
    Rows,
    Rule,
    StateTensor,
    register,
)
from muonscale.optim.rules.constraint import Constraint, resolve_constraint
from muonscale.optim.rules.moments import average_, average_squares_, widened
from muonscale.optim.rules.nonfinite import or_zeros
from muonscale.optim.rules.post_norm import PostNormContext, Reducer, resolve_post_norm
from muonscale.optim.rules.pre_norm import PreNormContext, resolve_pre_norm
from muonscale.optim.rules.row_magnitude import EXP_AVG, EXP_AVG_SQ, LENGTH, MAGNITUDE, STEP
from muonscale.optim.rules.scale import ScaleLike, check_scale, exact_factor, shape_factor

MOMENTUM_CONVENTION = "ema"
"""How `M` accumulates: "ema" here and in torch.optim.Muon; the paper's `M <- mu*M + G` is "sum"."""
ROW_STATE = "row_second_moment"
ROW_SKIPPED = "row_skipped"
"""1 for rows that the last step skipped, else 0."""
BLOCK_STEP = "block_step"
SECOND_MOMENT = "gradient_second_moment"
UPDATE_MOMENT = "update_second_moment"
MAGNITUDE_STATE = [
    StateTensor(MAGNITUDE, per="shard_row"),
    StateTensor(LENGTH, per="shard_row", negative=False),
    StateTensor(EXP_AVG, per="shard_row"),
    StateTensor(EXP_AVG_SQ, per="shard_row", negative=False),
    StateTensor(STEP, per="parameter", negative=False),
]

COMM_DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Dtypes of communication. Not float16: raw momentum is below its range."""


class MuonRule(Rule):
    """Momentum on every element, then `U = factor * post_norm(NS(pre_norm(N)))` on a matrix."""

    name = "muon"
    options = MuonOptions
    scale_free = True
    elements_touched = (
        8  # gradient, momentum and weight read, two of them written, direction, update
    )

    def check(self, options: Group) -> None:
        """Raise ConfigError for unknown coefficients, stages or dtypes."""
        resolve(options["ns_coefficients"], options["ns_steps"])
        if options["second_moment"] is not None:
            check_word("second_moment", options["second_moment"], get_args(SecondMomentT))
        resolve_pre_norm(options["pre_norm"])
        resolve_post_norm(options["post_norm"])
        resolve_constraint(options["constraint"])
        check_scale(options["scale"])
        whole = [t.name for t in self.state(options) if t.per in ("row", "matrix")]
        if options["block_period"] > 1 and whole:
            raise ConfigError(
                f"block_period is {options['block_period']}: a step on blocks has no whole matrices, "
                f"whose {whole[0]} the other options keep; give 1, or leave out post_norm='normuon', "
                "second_moment='update' and row_fraction"
            )
        dtype = options["ns_dtype"]
        if not isinstance(dtype, torch.dtype):
            check_word("ns_dtype", dtype, ("auto", *DTYPES))

    def state(self, group: Group) -> tuple[StateTensor, ...]:
        """Return the momentum, and what second moment, post-normalization and constraint keep."""
        tensors = [StateTensor("momentum_buffer")]
        if group["second_moment"] == "gradient":
            tensors.append(StateTensor(SECOND_MOMENT, negative=False))
        if group["second_moment"] == "update":
            tensors.append(StateTensor(UPDATE_MOMENT, per="matrix", negative=False))
        norm = resolve_post_norm(group["post_norm"])
        if group["row_fraction"] < 1:
            tensors.append(StateTensor(ROW_SKIPPED, per="row", spread=True, negative=False))
        if norm is not None and norm.row_state:
            tensors.append(StateTensor(ROW_STATE, per="row", negative=False))
        if _by_rows(group):
            tensors += MAGNITUDE_STATE
        if group["block_period"] > 1:
            tensors.append(StateTensor(BLOCK_STEP, per="parameter", negative=False))
        return tuple(tensors)

    def touched(self, group: Group) -> int:
        """Return the count for the momentum, a second moment that is read and written, and rows.

        Magnitudes of rows read weight and gradient for sums, read both and write the gradient of
        the directions, and read weight and update for sums.
        """
        moment = 2 * (group["second_moment"] is not None)
        return self.elements_touched + moment + 7 * _by_rows(group)

    def direction_(
        self, state: Mapping[str, list[Any]], G: list[Tensor], group: Group, mask: Tensor | None
    ) -> list[Tensor]:
        """Write one step into the moments, and return the directions to orthogonalize."""
        N = momentum_step_(
            state["momentum_buffer"],
            G,
            momentum=group["momentum"],
            nesterov=group["nesterov"],
            skipped=state.get(ROW_SKIPPED),
            mask=mask,
        )
        if group["second_moment"] != "gradient":
            return N
        beta, eps = group["second_moment_beta"], group["second_moment_eps"]
        return adapted_(N, G, state[SECOND_MOMENT], beta=beta, eps=eps, mask=mask)

    def matrix_update(self, group: Group) -> MuonUpdate:
        """Return orthogonalization, the normalizations around it, and shape factor."""
        norm = resolve_post_norm(group["post_norm"])
        row_states = [ROW_STATE] if norm is not None and norm.row_state else []
        row_states += [ROW_SKIPPED] if group["row_fraction"] < 1 else []
        return MuonUpdate(
            coefficients=resolve(group["ns_coefficients"], group["ns_steps"]),
            form=group["ns_form"],
            dtype=group["ns_dtype"],
            kernel=group["ns_kernel"],
            pre_norm=group["pre_norm"],
            second_moment_beta=group["second_moment_beta"],
            second_moment_eps=group["second_moment_eps"],
            element_states=(UPDATE_MOMENT,) if group["second_moment"] == "update" else (),
            post_norm=group["post_norm"],
            post_norm_eps=group["post_norm_eps"],
            normuon_beta2=group["normuon_beta2"],
            scale=group["scale"],
            rms=group["rms"],
            comm_dtype=COMM_DTYPES[group["comm_dtype"]],
            row_fraction=float(group["row_fraction"]),
            row_states=tuple(row_states),
        )

    def block_period(self, group: Group) -> int:
        """Return the option of that name."""
        return group["block_period"]

    def blockwise(self, state: Mapping[str, Any], group: Group) -> bool:
        """Return whether the number of the step, from 0, is no multiple of `block_period`."""
        period = group["block_period"]
        return period > 1 and (int(state[BLOCK_STEP]) - 1) % period != 0

    def constraint(self, group: Group) -> Constraint | None:
        """Return the constraint of the group."""
        return resolve_constraint(group["constraint"])


@dataclass(frozen=True, kw_only=True)
class MuonUpdate(MatrixUpdate):
    """The matrix update of Muon, for matrices of every shape."""

    coefficients: Coefficients
    form: str = "auto"
    dtype: DTypeLike = "auto"
    kernel: str = "auto"
    pre_norm: str | None = None
    second_moment_beta: float = 0.95
    second_moment_eps: float = 1e-10
    post_norm: str | None = None
    post_norm_eps: float = 1e-8
    normuon_beta2: float = 0.95
    scale: ScaleLike = "rms"
    rms: float = 0.2
    row_fraction: float = 1.0

    def update(
        self, N_NMK: Tensor, rows: Rows, shape: MatrixShape, reducer: Reducer
    ) -> tuple[Tensor, Rows]:
        """Return `factor * post_norm(NS(pre_norm(N)))` of whole matrices, and the new row state."""
        steps = self.coefficients.steps

        def polar(X_NMK: Tensor) -> Tensor:
            O_NMK = orthogonalize(
                X_NMK, self.coefficients, steps, self.form, self.dtype, kernel=self.kernel
            )
            return O_NMK.to(X_NMK.dtype)

        if self.row_fraction == 1:
            return self._around_polar(N_NMK, rows, shape, shape, reducer, polar)
        N_NMK = self._rounded(N_NMK)
        chosen = self.chosen_shape(shape)
        index_NR1 = largest_rows(N_NMK, chosen[0])
        part = {k: V.take_along_dim(index_NR1, 1) for k, V in rows.items() if k != ROW_SKIPPED}
        N_NRK = N_NMK.take_along_dim(index_NR1, 1)
        U_NRK, part = self._around_polar(N_NRK, part, shape, chosen, reducer, polar)
        part[ROW_SKIPPED] = torch.zeros_like(rows[ROW_SKIPPED].take_along_dim(index_NR1, 1))
        states = rows | {ROW_SKIPPED: torch.ones_like(rows[ROW_SKIPPED])}
        states = {k: V.scatter(1, index_NR1.expand_as(part[k]), part[k]) for k, V in states.items()}
        return torch.zeros_like(N_NMK).scatter_(1, index_NR1.expand_as(U_NRK), U_NRK), states

    def chosen_shape(self, shape: MatrixShape) -> MatrixShape:
        """Return the shape of what is orthogonalized: a part of the rows."""
        return (max(1, math.ceil(self.row_fraction * shape[0])), shape[1])

    def update_part(
        self, N_NMK: Tensor, rows: Rows, shape: MatrixShape, subgroup: Subgroup, segments: Segments
    ) -> tuple[Tensor, Rows]:
        """Return the same for this rank's part of every matrix: a collective of the subgroup."""
        reducer = SubgroupReducer(subgroup, divided_axis(shape))

        def polar(X_NMK: Tensor) -> Tensor:
            O_NMK = orthogonalize_part(
                X_NMK, shape, subgroup, self.coefficients, segments, self.dtype, self.kernel
            )
            return O_NMK.to(X_NMK.dtype)

        return self._around_polar(N_NMK, rows, shape, shape, reducer, polar)

    def _around_polar(
        self,
        N_NMK: Tensor,
        rows: Rows,
        shape: MatrixShape,
        chosen: MatrixShape,
        reducer: Reducer,
        polar: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Rows]:
        """Return the update of `chosen` rows of matrices of `shape`, whose shape factor it has."""
        N_NMK = self._rounded(N_NMK)
        if (before := resolve_pre_norm(self.pre_norm)) is not None:
            context = PreNormContext(shape=chosen, polar=polar, reducer=reducer)
            N_NMK = before.apply(N_NMK, context)
        U_NMK = polar(N_NMK)
        states = dict(rows)
        if (moment := rows.get(UPDATE_MOMENT)) is not None:
            U_NMK, states[UPDATE_MOMENT] = self._adapted(U_NMK, moment, reducer)
        last = None
        V_NM1 = rows.get(ROW_STATE)
        if (norm := resolve_post_norm(self.post_norm)) is not None:
            context = PostNormContext(
                shape=chosen, eps=self.post_norm_eps, beta2=self.normuon_beta2, reducer=reducer
            )
            U_NMK, V_NM1 = norm.apply(U_NMK, V_NM1, context)
            last = norm.last
        if self.scale == "rms_exact":
            sums = reducer.sum_all(U_NMK.square())
            U_NMK = U_NMK.mul_(exact_factor(sums, shape, self.rms))
        else:
            U_NMK = U_NMK.mul_(shape_factor(self.scale, shape, self.rms, last))
        if V_NM1 is not None:
            states[ROW_STATE] = V_NM1
        return self._rounded(U_NMK), states

    def _adapted(self, O_NMK: Tensor, V_NMK: Tensor, reducer: Reducer) -> tuple[Tensor, Tensor]:
        """`V <- b*V + (1-b)*O*O`, then `O / (sqrt(V) + eps)` at the length of O; AdaMuon."""
        before = reducer.sum_all(O_NMK.square())
        V_NMK = V_NMK.lerp(O_NMK.square(), 1 - self.second_moment_beta)
        U_NMK = O_NMK / V_NMK.sqrt().add_(self.second_moment_eps)
        after = reducer.sum_all(U_NMK.square())
        return U_NMK.mul_((before / after.masked_fill(after == 0, 1.0)).sqrt_()), V_NMK

    def _rounded(self, X: Tensor) -> Tensor:
        dtype = self.comm_dtype
        return X.to(dtype).to(X.dtype) if dtype.itemsize < X.dtype.itemsize == 4 else X

    def flops(
        self, shape: MatrixShape, state_dtype: torch.dtype, device: torch.device | str
    ) -> int:
        """Return the operations of Newton-Schulz."""
        return self.polar_runs(shape) * ns_flops(
            self.chosen_shape(shape),
            self.coefficients.steps,
            self.form,
            coefficients=self.coefficients,
            dtype=self.products_dtype(state_dtype, device),
            device=device,
            kernel=self.kernel,
        )

    def polar_runs(self, shape: MatrixShape) -> int:
        """Return 1, and what the pre-normalization adds."""
        norm = resolve_pre_norm(self.pre_norm)
        return 1 if norm is None else 1 + norm.polar_runs(self.chosen_shape(shape))

    def splits(
        self, short: int, state_dtype: torch.dtype, device: torch.device | str
    ) -> tuple[Sequence[tuple[float, float, float]], Sequence[Segments]]:
        """Return the triples and the segments that are accurate enough; none of a part of the rows."""
        if self.row_fraction < 1:
            return (), ()
        dtype = self.products_dtype(state_dtype, device)
        forms = accepted_segments(self.coefficients, self.form, dtype, short)
        return self.coefficients.triples, forms

    def products_dtype(self, state_dtype: torch.dtype, device: torch.device | str) -> torch.dtype:
        """Return the dtype of Newton-Schulz."""
        return resolve_dtype(self.dtype, state_dtype, device)

    def on_device(self, device: torch.device | str) -> MuonUpdate:
        """Return a copy with "auto" resolved for `device`; every GPU is assumed fast in bf16."""
        if torch.device(device).type == "cpu" or self.dtype != "auto":
            return self
        return replace(self, dtype=torch.bfloat16)

    @property
    def copies_before(self) -> bool:
        """Whether there is a pre-normalization, or a part of the rows is taken."""
        return self.pre_norm is not None or self.row_fraction < 1

    @property
    def copies_after(self) -> bool:
        """Whether a normalization, a second moment or the other rows follow the polar step."""
        return self.post_norm is not None or bool(self.element_states) or self.row_fraction < 1


def largest_rows(N_NMK: Tensor, count: int) -> Tensor:
    """Return `[N, count, 1]`: the rows with the largest sums of magnitudes, in order.

    Of equal rows the first ones are taken, on every device.
    """
    sums_NM = N_NMK.abs().sum(-1)
    order_NM = sums_NM.sort(dim=1, descending=True, stable=True).indices
    return order_NM[:, :count].sort(dim=1).values.unsqueeze(-1)


def momentum_step_(
    M: list[Tensor],
    G: list[Tensor],
    *,
    momentum: float,
    nesterov: bool,
    skipped: list[Tensor] | None = None,
    mask: Tensor | None = None,
) -> list[Tensor]:
    """Write one momentum step into `M`, and return the directions N.

        M <- mu*M + (1-mu)*G        N = mu*M + (1-mu)*G with Nesterov, else M

    Rows that the last step skipped do not decay: `M <- M + (1-mu)*G`.

    Args:
        M: momentum buffers, float32 or float64.
        G: gradients, same shapes, any floating dtype; not written to.
        momentum: mu, in [0, 1).
        nesterov: look one step ahead.
        skipped: 1 where the last step skipped a row, else 0; broadcasts to `M`.
        mask: 0-D bool; false leaves `M` as it is, and N may be anything. None counts as true.

    Returns:
        New tensors with Nesterov; otherwise the buffers themselves, which the caller only reads.
    """
    wide_G = widened(G, M)
    if skipped is None:
        average_(M, wide_G, momentum, mask)
    else:
        for m, g, skip in zip(M, or_zeros(mask, wide_G), skipped, strict=True):
            kept = momentum + (1 - momentum) * skip
            m.mul_(kept if mask is None else torch.where(mask, kept, 1.0))
            m.add_(g, alpha=1 - momentum)
    if not nesterov:
        return list(M)
    return list(torch._foreach_lerp(wide_G, M, momentum))


def adapted_(
    N: list[Tensor],
    G: list[Tensor],
    V: list[Tensor],
    *,
    beta: float,
    eps: float,
    mask: Tensor | None = None,
) -> list[Tensor]:
    """Write `V <- beta*V + (1-beta)*G*G`, and return `N` with new tensors `N / (sqrt(V) + eps)`.

    A bias correction would change the length of the direction alone, which the polar step removes.

    References:
        Muon2, arXiv 2604.09967; KellerJordan/modded-nanogpt, track 3, MuonSq.
    """
    average_squares_(V, widened(G, V), beta, mask)
    for i, v in enumerate(V):  # one at a time, so that two copies of all directions never exist
        N[i] = N[i] / v.sqrt().add_(eps)
    return N


def _by_rows(group: Group) -> bool:
    constraint = resolve_constraint(group["constraint"])
    return constraint is not None and constraint.by_rows


MUON = register(MuonRule())
