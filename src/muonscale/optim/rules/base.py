"""What an optimizer rule is, and the registry of all rules.

A rule makes an update `U` of a gradient `G`, in at most two stages, and every rule changes the
weight in the same way:

    N = direction_(state, G)       elementwise, on the shard of the parameter
    U = matrix_update(N)           on whole matrices, if the rule is on matrices; else U = N
    W <- (1 - rate)*W - lr*U       with decoupled weight decay (muonscale.optim.rules.decay)
                                   or under a constraint (muonscale.optim.rules.constraint)

Because the first stage is elementwise, state is sharded as its parameter is. Only directions and
updates move between ranks, and only for a rule on matrices or for partitioned state (ZeRO-1).

Adding a rule takes one file: a subclass of `Rule`, and `register(...)`. Sharding, checkpoints, cost
estimates, benchmarks and reports ask the rule for its state, its options and its cost. A rule of
this package has its options in `muonscale.optim.options`, where configs are checked without torch,
and is imported in `muonscale.optim.rules`.

Letters: G gradient, N direction, U update, W weight.
Shapes: N matrices, M rows (out), K columns (in).
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, Self

import torch
from torch import Tensor

from muonscale.errors import ConfigError
from muonscale.optim.matrices.batches import MatrixBatches, MatrixShape
from muonscale.optim.matrices.local import LocalMatrices
from muonscale.optim.newton_schulz.flops import Segments
from muonscale.optim.newton_schulz.subgroup import Subgroup
from muonscale.optim.options import RuleOptions, add_options, check_word
from muonscale.optim.rules.constraint import Constraint, MatrixSums
from muonscale.optim.rules.decay import decay_, decay_rate
from muonscale.optim.rules.master_weights import Weights
from muonscale.optim.rules.moments import write_
from muonscale.optim.rules.nonfinite import or_zeros, zero_unless_
from muonscale.optim.rules.post_norm import LOCAL, Reducer

Group = Mapping[str, Any]
"""All options of a parameter group."""

Rows = dict[str, Tensor]
"""Per-row state by name, `[N, M, 1]` for a batch of matrices; with it state per matrix element,
`[N, M, K]`."""


@dataclass(frozen=True)
class StateTensor:
    """A tensor that a rule keeps for every parameter."""

    name: str
    per: Literal["element", "row", "matrix", "shard_row", "parameter"] = "element"
    """One value per element, which `direction_` writes; one per row of each logical matrix, or per
    element of it, which the matrix update replaces; one per row on every rank that has a part of
    the row, which a constraint writes; or one number per parameter, a count of the steps that the
    parameter has taken."""
    spread: bool = False
    """Whether `direction_` reads a value per row, broadcast to the elements of the row."""
    negative: bool = True
    """Whether a value can be negative. A count cannot."""


@dataclass(frozen=True, kw_only=True)
class MatrixUpdate(ABC):
    """The second stage of a rule on matrices, for one set of options; a frozen dataclass."""

    row_states: tuple[str, ...] = ()
    """Names of the per-row state that it reads and replaces."""
    element_states: tuple[str, ...] = ()
    """Names of the state per matrix element that it reads and replaces."""
    comm_dtype: torch.dtype = torch.float32
    """Dtype of directions and updates in communication; they are rounded to it on one rank too."""

    @abstractmethod
    def update(
        self, N_NMK: Tensor, rows: Rows, shape: MatrixShape, reducer: Reducer
    ) -> tuple[Tensor, Rows]:
        """Return the update of a batch of whole matrices and the new per-row state.

        Args:
            N_NMK: directions, float32 or float64; not written to.
            rows: the state named in `row_states` and `element_states`; not written to.
            shape: (out, in) of the matrices.
            reducer: how to sum over rows, columns or whole matrices.
        """

    @abstractmethod
    def flops(
        self, shape: MatrixShape, state_dtype: torch.dtype, device: torch.device | str
    ) -> int:
        """Return the floating-point operations of the update of one matrix."""

    def products_dtype(self, state_dtype: torch.dtype, device: torch.device | str) -> torch.dtype:
        """Return the dtype of its matrix products."""
        return state_dtype

    def on_device(self, device: torch.device | str) -> Self:
        """Return a copy with "auto" resolved for `device`, which need not be in this machine."""
        return self

    @property
    def copies_before(self) -> bool:
        """Whether it keeps a copy of a batch during its matrix products."""
        return False

    @property
    def copies_after(self) -> bool:
        """Whether it allocates copies of a batch after its matrix products."""
        return False

    def update_part(
        self, N_NMK: Tensor, rows: Rows, shape: MatrixShape, subgroup: Subgroup, segments: Segments
    ) -> tuple[Tensor, Rows]:
        """Return update and per-row state of this rank's part of each matrix of a subgroup.

        Called only if `splits` is not empty.
        """
        raise NotImplementedError

    def polar_runs(self, shape: MatrixShape) -> int:
        """Return how often it evaluates the polynomial of `splits` on a matrix."""
        return 1

    def splits(
        self, short: int, state_dtype: torch.dtype, device: torch.device | str
    ) -> tuple[Sequence[tuple[float, float, float]], Sequence[Segments]]:
        """Return (triples, accepted segments) of the polynomial by which ranks can share a matrix.

        Args:
            short: the shorter side of the smallest matrix.
            state_dtype: dtype of the state.
            device: where the products are computed.
        """
        return (), ()


class Rule(ABC):
    """One optimizer rule. Instances have no state of their own."""

    name: ClassVar[str]
    """The name of the rule in parameter groups."""
    options: ClassVar[type[RuleOptions]]
    """A frozen dataclass: the rule's options, their defaults, and what they mean."""
    scale_free: ClassVar[bool] = False
    """Whether multiplying the gradient by a number leaves the update unchanged."""
    elements_touched: ClassVar[int]
    """Values read or written per element in one step with the default options, besides matrix
    products."""

    @property
    def title(self) -> str:
        """The name of the rule in text."""
        return self.options.title

    @property
    def on_matrices(self) -> bool:
        """Whether it works on whole matrices; then a parameter must hold at least one."""
        return self.options.on_matrices

    def check(self, options: Group) -> None:  # noqa: B027 - a rule need not have any
        """Raise ConfigError for invalid options that have the right type.

        Called for every group. A group has the options of all rules.
        """

    @abstractmethod
    def state(self, group: Group) -> tuple[StateTensor, ...]:
        """Return the state tensors of a parameter of `group`, an elementwise one first."""

    @abstractmethod
    def direction_(
        self, state: Mapping[str, list[Any]], G: list[Tensor], group: Group, mask: Tensor | None
    ) -> list[Tensor]:
        """Write one step into the elementwise state, and return the directions.

        Args:
            state: elementwise state by name, a list of tensors with the shapes of `G`; `spread`
                state broadcasts to these shapes; counts as a list of int, this step included.
            G: gradients or parts of them, any floating dtype; not written to.
            group: options.
            mask: 0-D bool on the device, or None. If it is false, a gradient is not finite: the
                state must stay as it is, and the directions may be anything. `average_` and
                `zero_unless_` do so without asking the host.

        Returns:
            New tensors, or the state tensors themselves, which the caller only reads. No views.
        """

    def touched(self, group: Group) -> int:
        """Return `elements_touched` with the options of a group."""
        return self.elements_touched

    def matrix_update(self, group: Group) -> MatrixUpdate | None:
        """Return the second stage, or None for an elementwise rule."""
        return None

    def block_period(self, group: Group) -> int:
        """Return in every how many steps sharded matrices are updated whole.

        In the other steps what a rank holds of a matrix is updated as a matrix of its own, with no
        state but that of `direction_`.
        """
        return 1

    def blockwise(self, state: Mapping[str, Any], group: Group) -> bool:
        """Return whether this step is one of the others, from the state of a parameter."""
        return False

    def constraint(self, group: Group) -> Constraint | None:
        """Return what a rule on matrices demands of the weight after an update, if anything."""
        return None

    def step_(
        self,
        W: Weights,
        G: list[Tensor],
        state: Mapping[str, list[Any]],
        group: Group,
        *,
        lr: float,
        rate: float,
        mask: Tensor | None,
    ) -> None:
        """Write one whole step of an elementwise rule; a rule with a fused kernel overrides it."""
        U = self.direction_(state, G, group, mask)
        apply_updates_(W, U, lr=lr, rate=rate, cautious=group["cautious_decay"], mask=mask)


RULES: dict[str, Rule] = {}
"""Every rule by name; a rule registers itself when its module is imported."""


def register(rule: Rule) -> Rule:
    """Add a rule to `RULES`, and return it.

    Raises:
        ConfigError: if `options.on_matrices` is set and `matrix_update` is missing, or the other
            way round; or see `muonscale.optim.options.add_options`.
    """
    if rule.on_matrices == (type(rule).matrix_update is Rule.matrix_update):
        raise ConfigError(
            f"rule {rule.name!r}: {rule.options.__name__}.on_matrices is {rule.on_matrices}, so "
            f"{type(rule).__name__} must {'' if rule.on_matrices else 'not '}define matrix_update"
        )
    add_options(rule.name, rule.options)
    RULES[rule.name] = rule
    return rule


def rule_of(group: Group) -> Rule:
    """Return the rule of a parameter group.

    Raises:
        ConfigError: for an unknown name.
    """
    return find_rule(group["rule"])


def find_rule(name: object, where: str = "rule") -> Rule:
    """Return the rule called `name`; `where` begins the sentence of the error."""
    check_word(where, name, tuple(RULES))
    return RULES[str(name)]


def rate_of(group: Group) -> float:
    """Return the part of a weight that one step of the group's rule subtracts."""
    constraint = rule_of(group).constraint(group)
    return decay_rate(group) if constraint is None or not constraint.keeps_norm else 0.0


class BatchUpdate(Protocol):
    """From the directions and per-row state of a batch to updates and new per-row state."""

    def __call__(self, N_NMK: Tensor, rows: Rows) -> tuple[Tensor, Rows]:
        """Return (U, new rows)."""
        ...


def batch_update(
    update: MatrixUpdate, shape: MatrixShape, reducer: Reducer = LOCAL, compile: bool | str = False
) -> BatchUpdate:
    """Return `update.update` for matrices of `shape`, compiled if `compile` is set."""
    if compile:
        return _compiled(
            update, shape, reducer, compile if isinstance(compile, str) else "inductor"
        )
    return functools.partial(update.update, shape=shape, reducer=reducer)


@functools.cache
def _compiled(
    update: MatrixUpdate, shape: MatrixShape, reducer: Reducer, backend: str
) -> BatchUpdate:
    """Compile a copy of the code for one shape.

    torch limits the recompilations of a code object, and many shapes of one object would reach the
    limit.
    """

    def run(N_NMK: Tensor, rows: Rows) -> tuple[Tensor, Rows]:
        return update.update(N_NMK, rows, shape, reducer)

    run.__code__ = run.__code__.replace()
    return torch.compile(run, backend=backend, dynamic=False)


@dataclass(frozen=True)
class Updates:
    """What `matrix_updates` returns."""

    tensors: list[Tensor]
    """Scaled updates with the parameters' stored shapes."""
    matrices: int
    squares: list[Tensor]
    """0-D tensors that add up to the sum of squares of all updates."""


def matrix_updates(
    N: list[Tensor],
    batches: MatrixBatches,
    update_of: Callable[[MatrixShape], BatchUpdate],
    *,
    rows: Mapping[str, list[Tensor]] | None = None,
    elements: Mapping[str, list[Tensor]] | None = None,
    mask: Tensor | None = None,
) -> Updates:
    """Return the update of every parameter; all matrices of one shape are one batch.

    Args:
        N: directions with the parameters' stored shapes; not written to, but taken out of the list,
            so that they are freed as soon as the updates are made.
        batches: matrices of the parameters.
        update_of: from a matrix shape to the update of a batch.
        rows: per-row states of the parameters by name; written to.
        elements: states per matrix element by name; written to.
        mask: 0-D bool; false leaves `rows` and `elements` as they are. None counts as true.
    """
    rows, elements = rows or {}, elements or {}
    gathered_rows = {name: batches.gather_rows(states) for name, states in rows.items()}
    gathered_rows |= {name: batches.gather(states) for name, states in elements.items()}
    gathered = batches.gather(N)
    N.clear()
    updates: dict[MatrixShape, Tensor] = {}
    for shape in list(gathered):
        own = {name: by_shape[shape] for name, by_shape in gathered_rows.items()}
        updates[shape], new = update_of(shape)(gathered.pop(shape), own)
        for name, values in new.items():
            kept = values if mask is None else torch.where(mask, values, own[name])
            gathered_rows[name][shape] = kept
    for name, states in rows.items():
        write_(states, batches.scatter_rows(gathered_rows[name]))
    for name, states in elements.items():
        write_(states, batches.scatter(gathered_rows[name]))
    return Updates(
        batches.scatter(updates),
        sum(U_NMK.shape[0] for U_NMK in updates.values()),
        [torch.linalg.vector_norm(U_NMK).square() for U_NMK in updates.values()],
    )


def apply_updates_(
    W: Weights,
    U: list[Tensor],
    *,
    lr: float,
    rate: float,
    cautious: bool = False,
    mask: Tensor | None = None,
) -> None:
    """Write `W <- (1 - rate)*W - lr*U`, rounded once if `W` is narrower than `U`.

    The shape factor within `U` does not multiply the decay. See `decay_` for `rate`, `cautious`.
    If `mask` (0-D bool) is false, `W` stays as it is, whatever `U` is.
    """
    new_W = W.wide(U)
    decay_(new_W, U, rate, cautious=cautious, mask=mask)
    torch._foreach_add_(new_W, or_zeros(mask, U), alpha=-lr)
    W.write_(new_W)


def constrained_sums(
    W: Weights, U: list[Tensor], matrices: list[LocalMatrices], *, rate: float, cautious: bool
) -> Tensor:
    """Return `[3, matrices]`, the rows of `MatrixSums` over what of every matrix is on this rank.

    The arguments are those of `apply_constrained_`; nothing is written.
    """
    sums = []
    for decayed, u, own in zip(W.copies(U), U, matrices, strict=True):
        decay_([decayed], [u], rate, cautious=cautious)
        pairs = (decayed, decayed), (u, u), (decayed, u)
        sums.append(torch.stack([own.dot(x, y) for x, y in pairs]))
    return torch.cat(sums, dim=1)


def apply_constrained_(
    W: Weights,
    U: list[Tensor],
    matrices: list[LocalMatrices],
    sums: Tensor,
    constraint: Constraint,
    group: Group,
    mask: Tensor | None = None,
) -> None:
    """Write `W <- keep*W - move*U` after decay, with two numbers for every matrix.

    Args:
        W: weights.
        U: updates; written to.
        matrices: the matrices of each weight.
        sums: from `constrained_sums`, over all ranks.
        constraint: gives the numbers.
        group: options.
        mask: 0-D bool; false leaves `W` as it is. None counts as true.
    """
    assert constraint.factors is not None
    keep, move = constraint.factors(MatrixSums(*sums), group)
    new_W = W.wide(U)
    decay_(new_W, U, rate_of(group), cautious=group["cautious_decay"], mask=mask)
    zero_unless_(mask, U)
    if mask is not None:
        keep, move = torch.where(mask, keep, 1.0), torch.where(mask, move, 0.0)
    counts = [own.count for own in matrices]
    each = zip(new_W, U, matrices, keep.split(counts), move.split(counts), strict=True)
    for w, u, own, kept, moved in each:
        own.scale_(w, kept)
        own.scale_(u, moved)
    torch._foreach_sub_(new_W, U)
    W.write_(new_W)
