"""Muon: the Muon rule for matrices and the AdamW rule for all else, in one optimizer.

`parameter_groups(model, ...)` makes its groups; each has a `rule`. A step writes parameters and
state, nothing else: gradients stay as they were. Not yet run on GPU.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from muonscale.errors import DivergedError, GroupingError, MuonscaleError
from muonscale.optim.arguments import (
    as_in_model,
    by_role,
    check_keys,
    own_groups,
    refuse_unknown,
    split_names,
    with_source,
)
from muonscale.optim.distributed.context import DistributedContext
from muonscale.optim.distributed.zero1 import gather
from muonscale.optim.newton_schulz.kernels import taken_kernel
from muonscale.optim.options import (
    GroupingOptions,
    all_defaults,
    check_word,
    defaults_of,
    names_of,
)
from muonscale.optim.parameters.source import check_replaced
from muonscale.optim.parameters.unfreeze import find_home, find_source, groups_of, scheduled, select
from muonscale.optim.parameters.validate import (
    check_changed_options,
    check_options,
    check_parameter,
    warn_of_narrow_parameters,
)
from muonscale.optim.rules import MUON
from muonscale.optim.rules.base import RULES, rule_of
from muonscale.optim.rules.muon import MOMENTUM_CONVENTION
from muonscale.optim.rules.nonfinite import FiniteCheck
from muonscale.optim.rules.step_inputs import Group, by_group, check_names, named
from muonscale.optim.state.state import counters_of, keep_by_name
from muonscale.optim.state.state_io import IncompatibleKeys, load_by_name, to_loadable
from muonscale.optim.step import StepTally, step_elements_, step_matrices_, step_shared_

NonfiniteT = Literal["raise", "skip"]

_CHECKED_EVERY = 16
"""Steps between two checks of a model whose gradients are all there."""


class Muon(torch.optim.Optimizer):
    """Update matrices by orthogonalized momentum, and everything else by AdamW.

    Muon rule, per logical matrix (Liu et al., Muon is Scalable for LLM Training, arXiv 2502.16982,
    equations 1, 2, 4; `M` is an average as in torch.optim.Muon, (1-mu) times the paper's sum):

        M <- mu*M + (1-mu)*G        N = mu*M + (1-mu)*G (Nesterov)
        O = post_norm(NS(pre_norm(N)))        W <- (1 - lr*wd)*W - lr*factor(out, in)*O

    AdamW rule: as torch.optim.AdamW. State is float32 (float64 for float64 parameters) whatever
    the dtype of the parameters. A parameter whose gradient is None is skipped, decay included; a
    gradient of zeros is a gradient. Parameters may be sharded in any way (DTensor): a step
    gives the same result as on one process (except with `block_period`). A parameter that is
    replaced in its group, moved or cast keeps its state, by name.

    Args:
        params: a model, whose groups `parameter_groups` makes; or groups from `parameter_groups`;
            or groups of your own, of which at least one needs a `rule` (Muon is the default) if
            there are several, optional `param_names`, and `matrices` (name to `MatrixSpec`) for
            what is not a plain 2-D matrix; or 2-D tensors, with or without names.
        *args: `lr`, `weight_decay`, `momentum` and `nesterov`, in this order as in
            torch.optim.Muon.
        **kwargs: the options of `CommonOptions`, `NarrowOptions`, `MuonOptions` and `AdamWOptions`
            in `muonscale.optim.options`, which a group can also have for itself, and:

            `adamw_lr`: learning rate of groups on AdamW that have none; `lr` if None.

            `heads` and `convolutions`, where `params` is a model: see `parameter_groups`.

            `compile`: run what Muon does to whole matrices through torch.compile, once for each
            shape; a string names a backend other than "inductor".

            `nonfinite`: what a NaN or an infinity in any gradient does. The whole step is left out
            on all ranks, with state and parameters unchanged; "raise" raises when the next step
            begins or at `check_finite()`, "skip" goes on and counts.

            `process_group`: ranks that hold identical replicas, as under DistributedDataParallel.
            Optimizer state is then partitioned across them (ZeRO-1). Not needed for sharded
            parameters (DTensor).

    Raises:
        GroupingError: for something on Muon that is no matrix, a parameter given twice, or several
            groups without any rule, as trainers make them by weight decay.
        ConfigError: for an option outside its range, or a key of a group that no option has.
        LayoutError: for placements that are not understood, and where ranks do not match.
        DivergedError: from `step` and `check_finite`, for a non-finite gradient.

    Examples:
        >>> from torch import nn
        >>> from muonscale import Muon
        >>> model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 50))
        >>> optimizer = Muon(model, lr=1e-3)  # or: Muon(parameter_groups(model, lr=1e-3, ...))
        >>> model(torch.arange(5)).logsumexp(-1).mean().backward()
        >>> optimizer.step()
        >>> optimizer.stats()["matrices"]
        1
    """

    def __init__(self, params: ParamsT | nn.Module, *args: Any, **kwargs: Any) -> None:
        signature = _signature()
        for key, value in kwargs.items():
            refuse_unknown(key, value, signature.parameters, "Muon was given")
        bound = signature.bind(self, params, *args, **kwargs)
        bound.apply_defaults()
        options = dict(bound.arguments)
        del options["self"], options["params"]
        adamw_lr, compile = options.pop("adamw_lr"), options.pop("compile")
        grouping = {name: options.pop(name) for name in names_of(GroupingOptions)}
        nonfinite, process_group = options.pop("nonfinite"), options.pop("process_group")
        check_word("nonfinite", nonfinite, get_args(NonfiniteT))
        if isinstance(compile, str):
            check_word("compile", compile, torch.compiler.list_backends(exclude_tags=()))
        defaults = {"rule": MUON.name, **options, "momentum_convention": MOMENTUM_CONVENTION}
        self._owners: dict[str, Tensor] = {}
        self._context = DistributedContext(process_group, compile, nonfinite)
        self._compile = compile
        self._nonfinite: NonfiniteT = nonfinite
        self._adamw_lr: float | None = adamw_lr
        params, self._source = with_source(params, grouping)
        groups = own_groups(params, adamw_lr)
        self._rules_given = False
        self._warned_of_narrow = True  # until all groups are there
        super().__init__(groups, defaults)
        self._rules_given = any("rule" in group for group in groups)
        self._warned_of_narrow = False
        self._reset_counters()
        self._keep_state()

    def _reset_counters(self) -> None:
        self._eager_step = torch.compiler.disable(
            Muon._step,
            reason="a step of Muon is not traced; Muon(compile=True) compiles its products",
        )
        self._pending: tuple[FiniteCheck, list[Tensor]] | None = None
        self._nonfinite_names: list[str] = []
        self._empty_steps = 0
        self._nonfinite_rank = 0
        self._skipped_steps = 0
        self._steps = 0
        self._matrices = 0
        self._update_rms = torch.zeros((), device="cpu")

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        own = {
            "_nonfinite": self._nonfinite,
            "_compile": self._compile,
            "_adamw_lr": self._adamw_lr,
            "_rules_given": self._rules_given,
            "_warned_of_narrow": self._warned_of_narrow,
        }
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._owners = {name: p for group in self.param_groups for name, p in named(group)}
        self._context = DistributedContext(None, self._compile, self._nonfinite)
        self._source = None  # a copy has other parameters than the model
        self._reset_counters()

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, check that its rule fits its parameters, and create their state.

        A group without a rule is added as a group for each role, if the optimizer was made from a
        model or from what `parameter_groups` returned. Where the groups of the optimizer were given
        rules and the model is not known, it is refused. torch's schedulers accept no group that is
        added after them; `unfreeze` lets parameters join the groups that are there.

        Raises:
            GroupingError: for a parameter that the model does not have, that is in another group,
                or on which the rule cannot work.
            ConfigError: for a key that no option has, or a value outside its range.
        """
        if not isinstance(param_group, dict):
            raise GroupingError(
                f"the group is a {type(param_group).__name__}: give one dict. Add the groups that "
                "parameter_groups returns one by one, and a module by unfreeze(module)"
            )
        group = dict(param_group)
        check_keys(group)
        group["params"], names = split_names(group.get("params"))
        if names is not None:
            group.setdefault("param_names", names)
        if not self._rules_given:
            self._add_group(group)
        elif "rule" in group:
            self._add_group(as_in_model(group, self._source))
        else:
            taken = {str(other.get("name")) for other in self.param_groups}
            for part in by_role(group, self._source, taken, self._adamw_lr):
                self._add_group(part)

    def _add_group(self, group: Group) -> None:
        group.setdefault("matrices", {})
        start = sum(len(other["params"]) for other in self.param_groups)
        numbers = range(start, start + len(group["params"]))
        group.setdefault("param_names", [f"parameter{number}" for number in numbers])
        self._check_unique(group)
        group.setdefault("peak_lr", group.get("lr", self.defaults["lr"]))
        options = {**self.defaults, **group}
        check_options(options)
        group["peak_lr"] = float(group["peak_lr"])
        for name, parameter in named(group):
            check_parameter(name, parameter, options)
        super().add_param_group(group)
        self._keep_state()

    def unfreeze(
        self, what: nn.Module | str | Sequence[str], model: nn.Module | None = None
    ) -> list[str]:
        """Train parameters that were frozen or new to the model, by the rule of their role.

        They get `requires_grad=True` and join the group of their role, so that its learning rate,
        its schedulers and its other options hold for them. A role that has no group yet gets one,
        with the options that `parameter_groups` and `Muon` were given and the learning rate at
        which a schedule has arrived (`initial_lr` included). torch's schedulers accept no group
        that is added after them: make them anew, with `last_epoch`.

        Call it on all ranks. Wrap a model in DistributedDataParallel again after it.

        Args:
            what: a module of the model, or the model itself; or a glob over parameter names, or
                several, where `*` also matches dots.
            model: needed where the optimizer does not know it: it was made from groups of your own,
                is a copy, or the model was replaced, by a wrapper for example.

        Returns:
            Names of the parameters that were in no group and are in one now.

        Raises:
            GroupingError: if the model is not known, or `what` is not in it.

        Examples:
            >>> from torch import nn
            >>> from muonscale import Muon
            >>> model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 50))
            >>> frozen = model[0].requires_grad_(False)
            >>> optimizer = Muon(model, lr=1e-3)
            >>> optimizer.unfreeze(model[0])  # or: optimizer.unfreeze("0.*")
            ['0.weight']
            >>> [(group["name"], group["rule"]) for group in optimizer.param_groups]
            [('hidden', 'muon'), ('head', 'adamw'), ('norm', 'adamw'), ('embedding', 'adamw')]
        """
        model, self._source = find_source(self._source, what, model, self.param_groups)
        chosen = select(model, what)
        held = {parameter for group in self.param_groups for parameter in group["params"]}
        new = [parameter for parameter in chosen if parameter not in held]
        frozen = [parameter for parameter in chosen if not parameter.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(True)
        try:
            groups = own_groups(groups_of(model, self._source, new), self._adamw_lr) if new else []
            for group in groups:
                self._join(group)
        except MuonscaleError:
            for parameter in frozen:
                parameter.requires_grad_(False)
            raise
        self._keep_state()
        return [name for group in groups for name in group["param_names"]]

    def _join(self, group: Group) -> None:
        """Put the parameters of a group into the group of their role, or add a group for the role."""
        home = find_home(group, self.param_groups)
        if home is None:
            peak_lr = float(group.get("lr", self.defaults["lr"]))
            self._add_group({**group, **scheduled(peak_lr, self.param_groups, group["rule"])})
            return
        self._check_unique(group)
        for name, parameter in named(group):
            check_parameter(name, parameter, {**home, "matrices": group["matrices"]})
        for key in ("params", "param_names"):
            home[key] += group[key]
        for key in ("matrices", "why"):
            home[key] = {**home.get(key, {}), **group[key]}
        home["guessed"] = [*home.get("guessed", []), *group["guessed"]]

    def _keep_state(self, resized: Literal["refuse", "leave"] = "refuse") -> None:
        """Ensure that every parameter has state; carry over that of a replaced or moved one."""
        self._context.assign(self.param_groups)
        owned = self._context.owned_matrices.get
        with torch.inference_mode(False), torch.no_grad():  # steps outside of it write to the state
            narrow = keep_by_name(
                self.param_groups, self.state, self._owners, owned, resized=resized
            )
        if narrow and not self._warned_of_narrow:
            warn_of_narrow_parameters(narrow)
            self._warned_of_narrow = True

    def _check_replaced(self) -> None:
        """Raise GroupingError if the model trains parameters in place of those in the groups.

        A parameter that was replaced has no gradient any more, or old ones that are never cleared.
        Walking through a model costs as much as a few kernels, so a step checks only where a
        gradient is missing, and every 16th step.
        """
        if self._source is None or (model := self._source.model) is None:
            return
        missing = any(p.grad is None for group in self.param_groups for p in group["params"])
        if missing or self._steps % _CHECKED_EVERY == 0:
            check_replaced(model, self.param_groups)
        self._steps += 1

    def _check_unique(self, group: Group) -> None:
        check_names(group)
        taken = {p: n for g in self.param_groups for n, p in named(g)}
        names = set(taken.values())
        for name, parameter in named(group):
            if parameter in taken:
                raise GroupingError(
                    f"{name} is given twice, the other time as {taken[parameter]}; give it once"
                )
            if name in names:
                raise GroupingError(
                    f"two parameters are called {name}: state is kept by name, so names must differ"
                )
            taken[parameter] = name
            names.add(name)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Perform one step on every parameter that has a gradient.

        Inside torch.compile it runs eagerly; `Muon(compile=True)` compiles the matrix products.

        Args:
            closure: reevaluates the model and returns the loss, which is returned.

        Raises:
            DivergedError: if `nonfinite="raise"` and the step before met a non-finite gradient.
            GroupingError: if the model that the optimizer was made from has replaced parameters
                that are in a group, so that those which have gradients are in none.
            LayoutError: if a parameter has another shape than its state, or ranks have other
                parameters.
            ConfigError: if options differ between ranks, or one was changed to a value outside its
                range, such as a learning rate of NaN.
        """
        return self._eager_step(self, closure)

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        """Perform a step outside of graphs: torch.compile would break it into a hundred."""
        self.check_finite()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            check_names(group)
        _follow_cycled_beta(self.param_groups)
        items = self._context.items(self.param_groups, self.state, self._prepare())
        self._empty_steps = 0 if items else self._empty_steps + 1
        if self._empty_steps == 2:  # a single one may be meant, before a scheduler
            warnings.warn(
                "no parameter of the optimizer has a gradient, so its steps change nothing. If the "
                "model has gradients, its parameters were replaced after the optimizer was made, as "
                "fully_shard does: make a new optimizer of the model",
                stacklevel=2,
            )
        check = self._context.check_finite(items)
        if check.mask is None and check.nonfinite_names():
            self._pending = check, []
            self._settle()
            return loss
        counters = [
            counter
            for group, part in by_group(items)
            for key in counters_of(group)
            for item in part
            if (counter := item.state.get(key)) is not None
        ]
        if counters:
            torch._foreach_add_(counters, 1)
        tally = StepTally()
        for rule in RULES.values():
            own = [item for item in items if item.group["rule"] == rule.name]
            for rank_group in self._context.rank_groups(self.param_groups, rule):
                if shared := [item for item in own if item.name in rank_group.names]:
                    tally += step_shared_(rule, rank_group, shared, check.mask)
                    own = [item for item in own if item.name not in rank_group.names]
            if rule.on_matrices:
                tally += step_matrices_(rule, own, check.mask, self._compile)
            else:
                tally += step_elements_(rule, own, check.mask)
        self._matrices = tally.matrices
        if tally.update_rms is not None:
            self._update_rms = tally.update_rms
        if check.mask is not None:
            self._pending = check, counters
        return loss

    def _prepare(self) -> MuonscaleError | None:
        """Ensure that every parameter has state; return why this rank cannot take the step, if so."""
        try:
            for group in self.param_groups:
                check_changed_options(group)
            self._keep_state()
            self._check_replaced()
        except MuonscaleError as error:
            return error
        return None

    def _settle(self) -> None:
        """Read the flag of the last step once it has arrived; count the step if left out."""
        if self._pending is None:
            return
        check, counters = self._pending
        self._pending = None
        names = check.nonfinite_names()
        if not names:
            return
        self._nonfinite_rank = check.nonfinite_ranks()[0]
        if counters:  # raised when the flag was still on its way
            torch._foreach_sub_(counters, 1)
        self._skipped_steps += 1
        self._matrices = 0
        self._nonfinite_names = names

    def check_finite(self) -> None:
        """Raise if the last step met a non-finite gradient; with "skip", only count it.

        Waits for the device. `step` calls it first, when the answer has long arrived. Training can
        go on after the error: nothing was written.

        Raises:
            DivergedError: naming the first such parameter, if `nonfinite="raise"`.
        """
        self._settle()
        names = self._nonfinite_names
        self._nonfinite_names = []
        if names and self._nonfinite == "raise":
            more = f" and {len(names) - 1} other parameters" if len(names) > 1 else ""
            where = f" on rank {self._nonfinite_rank}" if self._context.is_distributed else ""
            raise DivergedError(
                f"the gradient of {names[0]}{more} is not finite{where}. The step was left out: parameters "
                'and state are as before it. Lower the lr, or use nonfinite="skip", which goes on and counts such steps.'
            )

    def stats(self) -> dict[str, Any]:
        """Return what the last step did.

        Returns:
            `matrices`: logical matrices orthogonalized (0 for a step left out). `update_rms`: RMS
            of the scaled update over all elements on Muon, in units of lr, before decay and before
            a constraint; a 0-D tensor on the device, so that only reading it waits.
            `skipped_steps`: steps left out for non-finite gradients since construction, on a GPU
            those known so far. `ns_kernel`: the kernels of Newton-Schulz that the groups take,
            "torch" or "triton" or both.
        """
        kernels = {
            taken_kernel(group["ns_kernel"])
            for group in self.param_groups
            if group["rule"] == MUON.name
        }
        return {
            "matrices": self._matrices,
            "update_rms": self._update_rms,
            "skipped_steps": self._skipped_steps,
            "ns_kernel": ", ".join(sorted(kernels)),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the state in torch's form: integer keys, and `param_names` in every group.

        The state of a parameter that was resized in place is as it was before.
        """
        self._settle()
        self._keep_state(resized="leave")
        return to_loadable(super().state_dict())

    def full_state_dict(self) -> dict[str, Any]:
        """Return the whole state, as one process would have it: a collective of all ranks.

        Sharded and partitioned state is gathered on every rank; save it on
        one. `load_state_dict` takes it in any layout.
        """
        self._context.check_group()
        state_dict = self.state_dict()
        group = self._context.process_group
        state = {
            number: {key: gather(value, group) for key, value in values.items()}
            for number, values in state_dict["state"].items()
        }
        return {**state_dict, "state": state}

    @torch.no_grad()
    def load_state_dict(  # type: ignore[override]  # torch returns nothing
        self, state_dict: dict[str, Any], strict: bool = True
    ) -> IncompatibleKeys:
        """Take over state and options from `state_dict`, by parameter name.

        Momentum that was saved as a sum is converted. Dtypes and devices stay those of this
        optimizer. A group whose set of parameters is not a group of `state_dict` keeps its own
        options, with a warning.

        Args:
            state_dict: from `state_dict()` or `full_state_dict()`, also of another layout; or from
                `convert_state_dict`.
            strict: whether parameters and their state must be the same. If not, what fits is taken
                over, and all else stays as it is in this optimizer.

        Returns:
            What did not fit, by parameter name.

        Raises:
            CheckpointError: with a list of missing, unexpected and differing names, if `strict`.
                Nothing is written in that case.
        """
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        self._pending = None
        self._keep_state()
        incompatible = load_by_name(state_dict, self.param_groups, self.state, strict)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)
        return incompatible


def _signature() -> inspect.Signature:
    """Return the signature of `Muon`: torch's order first, then every option by its name."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    defaults = all_defaults()
    first = ("lr", "weight_decay", "momentum", "nesterov")
    own = {"adamw_lr": None, "compile": False, "nonfinite": "raise", "process_group": None}
    rest = {name: value for name, value in defaults.items() if name not in first} | own
    rest |= defaults_of(GroupingOptions)
    return inspect.Signature(
        [
            inspect.Parameter("self", positional),
            inspect.Parameter("params", positional),
            *(inspect.Parameter(name, positional, default=defaults[name]) for name in first),
            *(inspect.Parameter(name, keyword, default=value) for name, value in rest.items()),
        ]
    )


Muon.__init__.__signature__ = _signature()  # type: ignore[attr-defined]  # for help()


def _follow_cycled_beta(groups: list[Group]) -> None:
    """Cycle the momentum of every rule that has one with OneCycleLR and CyclicLR.

    Where an optimizer has betas, these schedulers write the cycled momentum into the first of them
    and nowhere else; `max_momentum` in a group says that they do.
    """
    for group in groups:
        if "max_momentum" in group and "momentum" in names_of(rule_of(group).options):
            group["momentum"] = group["betas"][0]
