"""A processor without BF16 instructions: all BF16 products are computed in fp32, and each result is rounded once."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import conv1d, grouped_mm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import releases
from fourfold.cli.tables.run import show_plan
from fourfold.core import widening
from fourfold.datatypes import Action
from fourfold.distributed import team as teams
from fourfold.model.checkpoint import Checkpoint
from fourfold.model.head import build_head, logits, sampled_gradient
from fourfold.model.layer import build_layer, pass_rows, push_back
from fourfold.model.mtp import Drafts, read_draft_head
from fourfold.quantize.plan import make_plan
from fourfold.quantize.streams import embedded, embeddings, read_head
from fourfold.recipe import Recipe, load_recipe
from fourfold.release import drafts, evaluate

Force = Callable[[bool], None]
MakeRecipe = Callable[..., Recipe]
CPU = torch.device("cpu")
PRODUCT = re.compile(r"mm|mv|dot|conv|attention|linear|matmul|gemm")


class Spy(TorchDispatchMode):
    """Operators below autograd that multiply BF16 matrices, on this thread and outside of the widening mode."""

    def __init__(self, seen: set[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name = func.overloadpacket.__name__
        if PRODUCT.search(name) and any(leaf.dtype == torch.bfloat16 for leaf in given):
            self.seen.add(name)
        return func(*args, **kwargs or {})


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Force:
    """force(widened): which way all products go, whatever this processor has."""
    return lambda widened: monkeypatch.setattr(widening, "required", widened)


@pytest.fixture
def multiplied(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Products of BF16 on every worker's thread and on this one."""
    spy, work = Spy(set()), teams.Team._work

    def spied(*arguments: Any) -> None:
        with Spy(spy.seen):
            work(*arguments)

    monkeypatch.setattr(teams.Team, "_work", spied)
    with spy:
        yield spy.seen


ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
USUAL = {"mm", "bmm", "_grouped_mm", "convolution", "convolution_backward", ATTENTION, f"{ATTENTION}_backward"}


@pytest.mark.parametrize("widened", [False, True])
def test_a_run_and_its_evaluation_multiply_no_bf16(
    source: Path, small: MakeRecipe, tmp_path: Path, force: Force, monkeypatch: pytest.MonkeyPatch,
    multiplied: set[str], widened: bool,
) -> None:  # fmt: skip
    """Sweep forward and back, both streams, moments, pools, head and drafts. Unforced, the spy sees all of them."""
    force(widened)
    monkeypatch.setattr(drafts, "PROMPTS", 2)
    recipe = small("guidance.tokens=256", "solver.passes=0", 'solver.scale="absmax"')
    releases.run(source, tmp_path / "out", recipe)
    protocol = evaluate.Protocol(text=Path(recipe.heldout.path), windows=2, length=128)
    evaluate.evaluate(tmp_path / "out", source, protocol=protocol)
    assert multiplied == (set() if widened else USUAL)


def test_the_same_bytes_twice_and_after_an_interruption(
    source: Path, small: MakeRecipe, tmp_path: Path, force: Force
) -> None:
    force(True)
    recipe, notes = small("solver.passes=0", 'solver.scale="absmax"'), list[str]()
    for name in ("whole", "cut", "moved"):
        if name != "whole":
            with pytest.raises(KeyboardInterrupt):
                releases.run(source, tmp_path / name, recipe, progress=releases.stop_at("solve", 1))
        force(name != "moved")  # to a machine of the other kind
        releases.run(source, tmp_path / name, recipe, progress=lambda event: notes.append(event.text))
    assert releases.tree(tmp_path / "cut") == releases.tree(tmp_path / "whole")
    moved = [note for note in notes if note.startswith("started on cpu")]
    assert len(moved) == 1 and moved[0].startswith("started on cpu without BF16 instructions, resumed on cpu: ")


@pytest.mark.parametrize("widened", [False, True])
def test_the_plan_names_the_way(source: Path, force: Force, widened: bool) -> None:
    force(widened)
    plan, shown = make_plan(source, load_recipe("best")), io.StringIO()
    show_plan(Console(file=shown, width=200), plan)
    line = "products                in fp32, rounded to BF16: this processor has no BF16 instructions"
    assert (" ".join(line.split()) in " ".join(shown.getvalue().split())) == widened
    assert plan.to_json()["memory"]["widened"] == widened
    assert not widening.widens("cuda:0")


def whole_numbers(*shape: int) -> Tensor:
    """BF16 values, whose products have exact fp32 sums in any order."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(len(shape))).bfloat16()


OFFSETS = torch.tensor([5, 5, 40], dtype=torch.int32)  # an expert without tokens
STEPS: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
    "mm": (torch.mm, [whole_numbers(40, 64), whole_numbers(64, 96)]),
    "addmm": (torch.addmm, [whole_numbers(96), whole_numbers(40, 64), whole_numbers(64, 96)]),
    "bmm": (torch.matmul, [whole_numbers(40, 64), whole_numbers(3, 64, 96)]),
    "conv1d": (lambda x, w: conv1d(x, w, padding=3, groups=8), [whole_numbers(2, 8, 40), whole_numbers(8, 1, 4)]),
    "grouped_mm": (lambda x, w: grouped_mm(x, w, offs=OFFSETS), [whole_numbers(40, 64), whole_numbers(3, 64, 96)]),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_product_is_rounded_once(step: str, force: Force, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the gradient of its input. fp32 is exact here, so that there is one right answer."""
    force(True)
    monkeypatch.setattr(widening, "PIECE_TOKENS", 7)
    multiply, given = STEPS[step]
    place, results = len(given) - 2, []
    for values in (given, [value.double() for value in given]):
        inputs = list(values)
        inputs[place] = inputs[place].clone().requires_grad_()
        with widening.products(CPU):
            if step == "grouped_mm" and inputs[0].dtype == torch.float64:
                parts = zip(inputs[0].split([5, 0, 35]), inputs[1], strict=True)
                output = torch.cat([part @ weight for part, weight in parts])
            else:
                output = multiply(*inputs)
            (pushed,) = torch.autograd.grad(output, inputs[place], whole_numbers(*output.shape).to(output.dtype))
        results.append((output.bfloat16(), pushed.bfloat16()))
    assert all(torch.equal(found, wanted) for found, wanted in zip(*results, strict=True))


# ---- layers, head and drafts


def outputs(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Of each layer and the head, and their gradients, and of the draft head's two steps; rows [T, D] of each. All are
    given the same inputs, whatever the others put out.
    """
    plan, generator = make_plan(folder, load_recipe("best")), torch.Generator().manual_seed(0)
    source = plan.source
    token_RT = torch.randint(100, 2000, (3, 40), generator=generator)
    hidden_RTD = embedded(embeddings(source), token_RT, torch.empty).to(dtype)
    gradient_RTD = torch.randn(hidden_RTD.shape, generator=generator).bfloat16().to(dtype)
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        for each in plan.layers:
            kept = [claim.header.name for claim in each.claims if claim.action is Action.COPY]
            layer = build_layer(source, each.index, source.read_layer(each.index, kept), CPU, dtype)
            found[f"layer {each.index}"] = pass_rows(layer, hidden_RTD)[0]
            found[f"gradient of layer {each.index}"] = push_back(layer, hidden_RTD, gradient_RTD)[0]
        head = build_head(source.blueprint, *read_head(source), CPU, dtype)
        found["head"] = logits(head, head.norm(hidden_RTD).flatten(0, 1))
        uniform_N = torch.rand(token_RT.numel(), dtype=torch.float64, generator=generator)
        found["gradient of head"] = sampled_gradient(head, hidden_RTD.flatten(0, 1), uniform_N)
        drafted = Drafts(read_draft_head(Checkpoint.open(folder), CPU, dtype), hidden_RTD, token_RT)
        position_RP = torch.arange(4, 36).expand(3, -1)
        found["first draft"] = drafted.first(position_RP)
        found["later draft"] = drafted.later(hidden_RTD[:, 4:36], token_RT[:, 5:37], position_RP)
    return {name: value.float().flatten(0, -2) for name, value in found.items()}


def test_outputs_are_the_usual_ones_but_for_rounding(source: Path, force: Force) -> None:
    """In the median over tokens: one whose experts change by a rounding has another output altogether."""
    wanted, both = outputs(source, torch.float32), []
    for widened in (False, True):
        force(widened)
        both.append(outputs(source, torch.bfloat16))
    for name, rows in wanted.items():
        usual, found = (each[name] for each in both)
        assert distance(found, usual) < 2**-7, name
        assert distance(found, rows) < 1.05 * distance(usual, rows) + 2**-10, name


def distance(found_TX: Tensor, wanted_TX: Tensor) -> float:
    return float(((found_TX - wanted_TX).norm(dim=-1) / wanted_TX.norm(dim=-1)).median())
