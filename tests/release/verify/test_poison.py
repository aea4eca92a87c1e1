"""The proof that a loader wrote every parameter, with loaders that do not."""

from __future__ import annotations

import importlib.util
import types
from collections.abc import Callable

import pytest
import torch
from torch import nn

from fourfold.release.verify.engine import SCRIPTS


@pytest.fixture(scope="module")
def poison() -> types.ModuleType:
    """Loaded by its path, as an engine's interpreter loads it."""
    spec = importlib.util.spec_from_file_location("poison", SCRIPTS / "poison.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 8, dtype=torch.bfloat16))
        self.weight_scale = nn.Parameter(torch.empty(4, 2))
        self.packed = nn.Parameter(torch.empty(4, 1, dtype=torch.int32), requires_grad=False)
        self.narrow = nn.Parameter(torch.empty(3, dtype=torch.float16))
        self.small = nn.Parameter(torch.empty(3, dtype=torch.uint8), requires_grad=False)
        self.k_scale = nn.Parameter(torch.full((1,), 1.5))

    def load(self, change: Callable[[Model], object] = lambda model: None) -> None:
        for name, parameter in self.named_parameters():
            if name != "k_scale":
                parameter.data.copy_(torch.arange(1, parameter.numel() + 1).view(parameter.shape))
        change(self)


def watched(poison: types.ModuleType, model: Model, change: Callable[[Model], object]) -> dict[str, dict[str, str]]:
    """`change` spoils what a good loader wrote."""
    before: dict[str, torch.Tensor] = {}

    def load() -> None:
        before.update({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
        model.load()
        for name in change(model) or ():
            getattr(model, name).data.copy_(before[name])

    found: dict[str, dict[str, str]] = poison.load_twice(model, load, (".k_scale", "k_scale"))
    return found


def test_a_good_loader(poison: types.ModuleType) -> None:
    model = Model()
    found = watched(poison, model, lambda model: ())
    assert (found["unwritten"], found["zero_scales"]) == ({}, {})
    assert (found["parameters"], found["elements"]) == (5, 32 + 8 + 4 + 3 + 3)
    assert model.weight.flatten().tolist() == list(range(1, 33))  # what the second load wrote stays
    assert model.k_scale.item() == 1.5  # the engine's own default is given back


@pytest.mark.parametrize("name", ["weight", "weight_scale", "packed", "narrow", "small"])
def test_a_parameter_that_is_skipped(poison: types.ModuleType, name: str) -> None:
    found = watched(poison, Model(), lambda model: (name,))
    count = getattr(Model(), name).numel()
    assert found["unwritten"] == {name: f"{count} of {count}"}


@pytest.mark.parametrize("name", ["weight", "packed", "narrow", "small"])
def test_one_element_that_is_skipped(poison: types.ModuleType, name: str) -> None:
    model = Model()
    last: list[torch.Tensor] = []

    def load() -> None:
        last.append(getattr(model, name).data.flatten()[-1].clone())
        model.load(lambda model: getattr(model, name).data.view(-1)[-1:].copy_(last[-1]))

    found = poison.load_twice(model, load, ("k_scale",))
    assert found["unwritten"] == {name: f"1 of {getattr(model, name).numel()}"}


def test_a_checkpoint_that_holds_one_of_the_fillings(poison: types.ModuleType) -> None:
    """Equal to one filling by chance is not equal to both."""
    model = Model()
    load = lambda: model.load(lambda model: model.weight.data.view(-1)[0:1].fill_(poison.FILLINGS[0][0]))  # noqa: E731
    assert poison.load_twice(model, load, ("k_scale",))["unwritten"] == {}


def test_zero_and_empty_scales(poison: types.ModuleType) -> None:
    model = Model()
    load = lambda: model.load(lambda model: model.weight_scale.data[1].zero_())  # noqa: E731
    assert poison.load_twice(model, load, ("k_scale",))["zero_scales"] == {"weight_scale": "2 of 8"}
    model.weight_scale = nn.Parameter(torch.empty(4, 0))
    assert poison.load_twice(model, model.load, ("k_scale",))["zero_scales"] == {"weight_scale": "empty"}
