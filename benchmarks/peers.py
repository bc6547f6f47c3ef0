"""The sides of benchmarks/optimizer_step.py as data: who they are, how they are built, patched.

Every side is set to the same rule wherever it has the option: momentum 0.95 with Nesterov, five
Newton-Schulz steps with Jordan's coefficients, update RMS 0.2, decoupled decay. A peer stands as it
is shipped, and once more with its products in float32.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol
from unittest import mock

import torch
from torch import Tensor
from torch.nn import Parameter

from muonscale.lab.console import dtype_text

Triple = tuple[float, float, float]

LR, WEIGHT_DECAY, MOMENTUM = 1e-3, 0.1, 0.95
STEPS = 5
JORDAN: tuple[Triple, ...] = ((3.4445, -4.7750, 2.0315),) * STEPS
YOU: tuple[Triple, ...] = (  # modded-nanogpt's five, the only ones heavyball's Muon has
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


class Stepper(Protocol):
    """What is timed."""

    state: Any

    def step(self) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Side:
    """One implementation in one setting."""

    name: str
    products: torch.dtype
    """Dtype of its Newton-Schulz products."""
    build: Callable[[list[Parameter]], Stepper]
    how: str
    """What was set or patched, in words."""
    patch: Callable[[], AbstractContextManager[Any]] = nullcontext
    """In force while it is built and stepped."""
    triples: tuple[Triple, ...] = JORDAN
    ours: bool = False
    warmup: int = 0
    """Steps after the first two before times are steady."""
    compiled: bool = False
    """Runs in compiled graphs, in which products cannot be counted."""


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def our_muon(ns_dtype: str, parameters: list[Parameter]) -> Stepper:
    from muonscale import Muon

    named = [(f"matrix{i}", parameter) for i, parameter in enumerate(parameters)]
    return Muon(named, lr=LR, weight_decay=WEIGHT_DECAY, ns_dtype=ns_dtype)


def newton_schulz_loop(G: Tensor, dtype: torch.dtype) -> Tensor:
    """Return NS(G) `[out, in]` by fused `addmm`s, transposed to the short side."""
    tall = G.shape[0] > G.shape[1]
    X = (G.T if tall else G).to(dtype, copy=True, memory_format=torch.contiguous_format)
    X /= X.norm().clamp(min=1e-7)
    for a, b, c in JORDAN:
        A = X @ X.T
        B = torch.addmm(A, A, A, beta=b, alpha=c)
        X = torch.addmm(X, B, X, beta=a)
    return X.T if tall else X


@dataclass
class AddmmLoop:
    """The plainest competent Muon: one matrix after the other."""

    parameters: list[Parameter]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        self.state = {W: torch.zeros_like(W) for W in self.parameters}

    @torch.no_grad()
    def step(self) -> None:
        for W, M in self.state.items():
            G = W.grad
            M.lerp_(G, 1 - MOMENTUM)
            O = self.polar(G.lerp(M, MOMENTUM), W)  # noqa: E741
            W.mul_(1 - LR * WEIGHT_DECAY)
            W.add_(O, alpha=-LR * 0.2 * max(W.shape) ** 0.5)

    def polar(self, N: Tensor, W: Parameter) -> Tensor:
        """Return Newton-Schulz of a direction, as it lies for its parameter."""
        return newton_schulz_loop(N, self.dtype)


def torch_muon(parameters: list[Parameter]) -> Stepper:
    return torch.optim.Muon(
        parameters, lr=LR, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"
    )


def pytorch_optimizer_muon(method: str, parameters: list[Parameter]) -> Stepper:
    from pytorch_optimizer import Muon

    group = {"params": parameters, "use_muon": True, "lr": LR, "weight_decay": WEIGHT_DECAY}
    return Muon([group], use_adjusted_lr=True, ns_method=method)


def optimuon_muon(parameters: list[Parameter], **options: Any) -> Stepper:
    from optimuon import Muon

    return Muon(
        parameters,
        lr=LR,
        weight_decay=WEIGHT_DECAY,
        adjust_lr="match_rms_adamw",
        ns_coefficients=JORDAN,
        ns_norm_scale=1.0,
        normuon=False,  # on by default, and then the update is another one
        cautious_wd=False,
        **options,
    )


def heavyball_muon(parameters: list[Parameter]) -> Stepper:
    import heavyball

    # A graph for every shape: with torch's limit of 8 the rest would quietly not be compiled.
    torch._dynamo.config.recompile_limit = 64
    return heavyball.Muon(parameters, lr=LR, betas=(MOMENTUM, 0.99), weight_decay=WEIGHT_DECAY)


def timm_module() -> types.ModuleType:
    """Import timm's Muon as a file, past the `__init__`s that want torchvision."""
    spec = importlib.util.find_spec("timm")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'timm'")
    folder = spec.submodule_search_locations[0]
    for name, path in {"timm": folder, "timm.optim": f"{folder}/optim"}.items():
        package = types.ModuleType(name)
        package.__path__ = [path]
        package.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        package.__spec__.submodule_search_locations = [path]
        sys.modules.setdefault(name, package)
    return importlib.import_module("timm.optim.muon")


def timm_muon(parameters: list[Parameter]) -> Stepper:
    return timm_module().Muon(
        parameters,
        lr=LR,
        weight_decay=WEIGHT_DECAY,
        momentum=MOMENTUM,
        nesterov=True,
        ns_coefficients="original",
        adjust_lr_fn="match_rms_adamw",
    )


def keller_jordan_muon(parameters: list[Parameter]) -> Stepper:
    from muon import SingleDeviceMuon

    return SingleDeviceMuon(parameters, lr=LR, weight_decay=WEIGHT_DECAY, momentum=MOMENTUM)


def bfloat16_is_float() -> AbstractContextManager[Any]:
    """For those who write `X = G.bfloat16()`: the same code, with `G.float()`."""
    return mock.patch.object(Tensor, "bfloat16", Tensor.float)


@contextmanager
def torch_muon_in_float32() -> Iterator[None]:
    """Let torch.optim.Muon multiply in float32.

    It writes `X.bfloat16()`, from 2.15 on `X.to(torch.bfloat16, copy=True)`. It then writes into the
    result, so the float32 one must be a copy too.
    """
    float32_torch = types.SimpleNamespace(**{**vars(torch), "bfloat16": torch.float32})
    with (
        mock.patch.object(Tensor, "bfloat16", lambda X: X.float().clone()),
        mock.patch.object(torch.optim._muon, "torch", float32_torch),
    ):
        yield


def float32_by_default(
    home: Callable[[], types.ModuleType], function: str
) -> AbstractContextManager[Any]:
    """For those whose Newton-Schulz function has a `dtype` that the optimizer never passes."""
    original = getattr(module := home(), function)
    return mock.patch.object(module, function, partial(original, dtype=torch.float32))


def not_rounded(ref: Tensor, source: Tensor | None = None) -> Tensor:
    return ref if source is None else source.to(ref.dtype)


def no_stochastic_rounding() -> AbstractContextManager[Any]:
    """For heavyball, which gets its bfloat16 by stochastic rounding."""
    return mock.patch.object(
        importlib.import_module("heavyball.utils"), "stochastic_round_", not_rounded
    )


def own_sides(fast_bf16: bool) -> Iterator[Side]:
    """Yield ours and the hand-written loop, in bfloat16 too where that is fast."""
    for dtype in [torch.float32, *([torch.bfloat16] if fast_bf16 else [])]:
        name = dtype_text(dtype)
        yield Side(
            name=f"muonscale {name}",
            products=dtype,
            build=partial(our_muon, name),
            how=f'`Muon(parameters, ns_dtype="{name}")`',
            ours=True,
        )
    for dtype in [torch.float32, *([torch.bfloat16] if fast_bf16 else [])]:
        name = dtype_text(dtype)
        yield Side(
            name=f"addmm loop {name}",
            products=dtype,
            build=partial(AddmmLoop, dtype=dtype),
            how="per-matrix loop in this benchmark: short side first, fused `addmm`",
        )


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Somebody else's Muon, which stands as it is shipped and in float32."""

    name: str
    package: str
    """As on PyPI, for its version."""
    build: Callable[[list[Parameter]], Stepper]
    settings: str
    """What is set in both rows, in words."""
    how: str
    """What makes it float32, in words."""
    patch: Callable[[], AbstractContextManager[Any]] = nullcontext
    """What makes it float32; or else:"""
    build_float32: Callable[[list[Parameter]], Stepper] | None = None
    shipped: torch.dtype = torch.bfloat16
    """Dtype of its products as shipped."""
    triples: tuple[Triple, ...] = JORDAN
    warmup: int = 0
    compiled: bool = False

    def sides(self) -> Iterator[Side]:
        """Yield the peer as shipped and in float32."""
        common = {
            "triples": self.triples,
            "warmup": self.warmup,
            "compiled": self.compiled,
        }
        yield Side(
            name=f"{self.name} as shipped",
            products=self.shipped,
            build=self.build,
            how=f"{self.settings}; as shipped",
            **common,
        )
        yield Side(
            name=f"{self.name} float32",
            products=torch.float32,
            build=self.build_float32 or self.build,
            patch=self.patch,
            how=f"{self.settings}; {self.how}",
            **common,
        )


PYTORCH_OPTIMIZER = partial(importlib.import_module, "pytorch_optimizer.optimizer.muon.base")

PEERS = (
    Peer(
        name="torch.optim.Muon",
        package="torch",
        build=torch_muon,
        patch=torch_muon_in_float32,
        settings="RMS scale",
        how="its module's `torch.bfloat16` is `torch.float32`",
    ),
    Peer(
        name="muon-optimizer",
        package="muon-optimizer",
        build=keller_jordan_muon,
        patch=bfloat16_is_float,
        settings="`SingleDeviceMuon`; it has its own scale",
        how="`Tensor.bfloat16` is `Tensor.float`",
    ),
    Peer(
        name="timm",
        package="timm",
        build=timm_muon,
        patch=partial(float32_by_default, timm_module, "zeropower_via_newtonschulz"),
        settings="original coefficients, RMS scale; imported past the packages that want torchvision",
        how="default `dtype` of its `zeropower_via_newtonschulz` replaced",
    ),
    Peer(
        name="pytorch_optimizer",
        package="pytorch_optimizer",
        build=partial(pytorch_optimizer_muon, "newton_schulz"),
        patch=partial(float32_by_default, PYTORCH_OPTIMIZER, "zero_power_via_newton_schulz_5"),
        settings="RMS scale, `newton_schulz`",
        how="default `dtype` of its `zero_power_via_newton_schulz_5` replaced",
    ),
    Peer(
        name="pytorch_optimizer Gram",
        package="pytorch_optimizer",
        build=partial(pytorch_optimizer_muon, "gram_newton_schulz"),
        shipped=torch.float16,
        patch=partial(float32_by_default, PYTORCH_OPTIMIZER, "zero_power_via_gram_newton_schulz"),
        settings="RMS scale, `gram_newton_schulz`",
        how="default `dtype` of its `zero_power_via_gram_newton_schulz` replaced",
    ),
    Peer(
        name="optimuon",
        package="optimuon",
        build=partial(optimuon_muon, gram_ns=False),
        build_float32=partial(optimuon_muon, gram_ns=False, ns_dtype=torch.float32),
        settings="`gram_ns=False`, Jordan's coefficients, RMS scale, no NorMuon, no cautious decay",
        how="its own option `ns_dtype=torch.float32`",
    ),
    Peer(
        name="optimuon Gram",
        package="optimuon",
        build=optimuon_muon,
        build_float32=partial(optimuon_muon, ns_dtype=torch.float32),
        shipped=torch.float16,
        settings="Jordan's coefficients, RMS scale, no NorMuon, no cautious decay",
        how="its own option `ns_dtype=torch.float32`",
    ),
    Peer(
        name="heavyball",
        package="heavyball",
        build=heavyball_muon,
        patch=no_stochastic_rounding,
        settings="it has its own coefficients and scale; compiles itself",
        how="`heavyball.utils.stochastic_round_` leaves float32 as it is",
        triples=YOU,
        warmup=2,
        compiled=True,
    ),
)


def all_sides(fast_bf16: bool) -> list[Side]:
    """Return ours, the loop, and the peers."""
    return [*own_sides(fast_bf16), *(side for peer in PEERS for side in peer.sides())]


def versions() -> dict[str, str]:
    """Return the version of every package that takes part."""
    import muonscale

    packages = ["torch", *(peer.package for peer in PEERS)]
    return {"muonscale": muonscale.__version__} | {name: version_of(name) for name in packages}
