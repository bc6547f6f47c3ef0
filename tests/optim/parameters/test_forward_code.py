"""The output layer is found in the ways people write `forward`; in each it is called `head`."""

from __future__ import annotations

from functools import partial, reduce

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from muonscale.errors import GroupingError
from muonscale.optim.parameters.groups import parameter_groups
from muonscale.optim.parameters.report import grouping_report
from muonscale.optim.parameters.roles import Role, assign_roles

WAYS: list[type[nn.Module]] = []


class Net(nn.Module):
    """Three layers, of which the last is `head`. Subclasses with a `forward` are tests."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.mid = nn.Linear(4, 8), nn.Linear(8, 6)
        self.head = nn.Linear(6, 3)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        WAYS.append(cls)


class Heads(Net):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.ModuleDict({"a": nn.Linear(6, 3), "b": nn.Linear(6, 2)})

    def forward(self, x: Tensor) -> dict:
        x = self.mid(self.body(x))
        return {name: layer(x) for name, layer in self.head.items()}


class Keywords(Net):
    def classify(self, scale: float = 1.0, *, features: Tensor) -> Tensor:
        return self.head(self.mid(features)) * scale

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(features=self.body(x))


class Keys(Net):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.layers = nn.ModuleDict({"body": nn.Linear(4, 8), "head": nn.Linear(8, 3)})

    def forward(self, x: Tensor) -> Tensor:
        return self.layers["head"](self.layers["body"](x))


class Values(Net):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.layers = nn.ModuleDict({"body": nn.Linear(4, 8), "head": nn.Linear(8, 3)})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = torch.relu(layer(x))
        return x


class Inner(Net):
    def forward(self, x: Tensor) -> Tensor:
        def finish(z: Tensor) -> Tensor:
            return self.head(self.mid(z))

        return finish(self.body(x))


class Lambda(Net):
    def forward(self, x: Tensor) -> Tensor:
        finish = lambda z: self.head(self.mid(z))  # noqa: E731
        return finish(self.body(x))


class Ternary(Net):
    def __init__(self, flag: bool = True) -> None:
        super().__init__()
        self.flag, self.head_too = flag, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        head = self.head if self.flag else self.head_too
        return head(self.mid(self.body(x)))


class Partial(Net):
    def forward(self, x: Tensor) -> Tensor:
        finish = partial(self.head)
        return finish(self.mid(self.body(x)))


class Written(Net):
    def forward(self, x: Tensor) -> Tensor:
        for layer in [self.body, self.mid, self.head]:
            x = layer(x)
        return x


class Walrus(Net):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (h := self.mid(self.body(x))), self.head(h)


class InCondition(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.body(x))
        if (y := self.head(x)) is not None:
            return y
        return x


class Training(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.mid(self.body(x))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self.head(self(batch[0])), batch[1])


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 8), nn.Linear(8, 6)])
        self.layers.append(nn.Linear(6, 1))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
        return self.layers[-1](x)


class Appended(Net):
    def forward(self, x: Tensor) -> Tensor:
        parts = []
        x = self.mid(self.body(x))
        for i in range(3):
            parts.append(self.head(x[i]))
        return torch.stack(parts)


class Agent(Net):
    def value(self, x: Tensor) -> Tensor:
        return self.mid(self.body(x)).mean(-1)

    def action(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.mid(self.body(x))
        return self.head(x).argmax(-1), self.value(x)


class Normed(Net):
    def __init__(self) -> None:
        super().__init__()
        parametrizations.weight_norm(self.head)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mid(self.body(x)))


class Compiled(Net):
    def __init__(self) -> None:
        super().__init__()
        self.head = torch.compile(self.head)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mid(self.body(x)))


class Base(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mid(self.body(x)))


class Derived(Base):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Static(Net):
    @staticmethod
    def finish(x: Tensor) -> Tensor:
        return x * 2

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.head(self.mid(self.body(x))))


class BitLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        return F.linear(x, w + (w.sign() - w).detach())


class Quantized(Net):
    def __init__(self) -> None:
        super().__init__()
        self.head = BitLinear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mid(self.body(x)))


class Adaptive(Net):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.AdaptiveLogSoftmaxWithLoss(6, 20, [5, 10], div_value=2.0)

    def forward(self, x: Tensor, target: Tensor) -> tuple:
        return self.head(self.mid(self.body(x)), target)


class Matched(Net):
    def forward(self, x: Tensor, kind: str = "a") -> Tensor:
        x = self.mid(self.body(x))
        match kind:
            case "a":
                return self.head(x)
            case _:
                return x * 2


class Tried(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.body(x))
        try:
            import no_such_kernel  # type: ignore[import-not-found]
        except ImportError:
            return self.head(x)
        return no_such_kernel.apply(self.head(x))


class Cosine(Net):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Parameter(torch.randn(3, 6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(self.mid(self.body(x))), F.normalize(self.head))


class Named(Net):
    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, "head")(self.mid(self.body(x)))  # noqa: B009


class Children(Net):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x


@pytest.mark.parametrize("way", [way for way in WAYS if way is not Agent])
def test_the_head_is_found(way: type[nn.Module]) -> None:
    found = assign_roles(way())
    named = {a.name for a in found if "head" in a.name and a.role != Role.NORM}
    assert named and {a.name for a in found if a.role == Role.HEAD} == named
    assert not any(a.guessed for a in found)


@pytest.mark.parametrize(
    ("way", "expected"), [(Agent, {"head.weight"}), (Perceptron, {"layers.2.weight"})]
)
def test_heads_of_methods_and_of_lists(way: type[nn.Module], expected: set[str]) -> None:
    assert {a.name for a in assign_roles(way()) if a.role == Role.HEAD} == expected


def test_a_path_that_cannot_be_followed_is_said() -> None:
    class Reduced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            names = ["first", "second"]
            return reduce(lambda y, name: self.get_submodule(name)(y), names, x)

    with pytest.warns(UserWarning, match=r"second\.weight"):
        groups = parameter_groups(Reduced())
    assert [row.name for row in grouping_report(groups).guesses] == ["second.weight"]
    parameter_groups(Reduced(), strict=True, overrides={"second.weight": {"role": "head"}})


def test_a_scripted_module_gets_a_sentence() -> None:
    with pytest.raises(GroupingError, match="script"):
        parameter_groups(torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))))
