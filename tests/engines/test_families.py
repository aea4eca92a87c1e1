"""Releases of many families in real vLLM: all in one process, each with the loader of its own class, twins beside some.

Every family whose `proven` names vLLM is loaded, and run unless it says "not run". Its twin is the same
release in BF16. Release, twin and the log-probabilities that quantize stored are three computations of one function;
the distance of the two that have nothing of int4 in them is the noise that the others are held to.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import Tensor

import checkpoints
import family_releases
import releases
from fourfold.model.family import FAMILIES, VLLM, VLLM_LOADS
from fourfold.records.results import Status
from fourfold.release.release import Release
from fourfold.release.verify import vllm
from fourfold.release.verify.engine import Engine, environment

pytestmark = pytest.mark.engine

LOADED = [name for name, family in FAMILIES.items() if {VLLM, VLLM_LOADS} & {*family.proven}]
RUN = [name for name in LOADED if VLLM in FAMILIES[name].proven]
# One of each kind: names, routers, gates, tails, attention. Twins of the others would tell nothing new, and vLLM has no
# experts without gates in BF16 for CPUs (nemotron_h).
TWINS = ["gemma4", "glm4_moe", "minimax_m2", "mixtral", "cohere2_moe", "deepseek_v3", "qwen3_next", "afmoe", "olmoe"]
GPTQ = ["glm4_moe", "mixtral"]
SWAPPED = "olmoe"
Find = Callable[[str], Path]


@dataclass(frozen=True)
class Ran:
    """log-probabilities of a text's tokens: of the release and its twin in vLLM, and as quantize stored them."""

    answer: vllm.Answer
    stored: list[float]

    @property
    def scores(self) -> list[float]:
        assert not self.answer.failure, self.answer.failure
        found: list[float] = self.answer.content["prompt_logprobs"][0]
        return found


def apart(one: list[float], other: list[float]) -> float:
    return vllm.differences([one], [other])[0]


def noise(ran: Mapping[str, Ran], name: str) -> float:
    """How far vLLM's BF16 is from transformers', whose arithmetic quantize's is."""
    return apart(ran[f"{name} twin"].scores, ran[name].stored)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What vLLM is given, by name."""
    root = tmp_path_factory.mktemp("families")
    releases.write_recipe(root)
    found: dict[str, Path] = {}
    for name in LOADED:
        source = family_releases.make_source(root / "sources" / name, name)
        found[name] = family_releases.make_release(root / "releases" / name, source, root)
        if name in GPTQ:
            found[f"{name} gptq"] = family_releases.make_release(root / "gptq" / name, source, root, "format=gptq")
    (root / "twins").mkdir()
    for name in TWINS:
        found[f"{name} twin"] = family_releases.make_twin(root / "twins" / name, found[name])
    found["swapped"] = shutil.copytree(found[SWAPPED], root / "swapped")
    checkpoints.edit(found["swapped"], swap_)
    return found


def swap_(tensors: dict[str, Tensor]) -> None:
    """Experts 0 and 1 of the last layer, in each other's place."""
    for name in [name for name in tensors if ".layers.3." in name and ".experts.0." in name]:
        other = name.replace(".experts.0.", ".experts.1.")
        tensors[name], tensors[other] = tensors[other], tensors[name]


@pytest.fixture(scope="module")
def ran(folders: dict[str, Path], python: Find, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Ran]:
    """One start of vLLM for all of them; the exact kernel, so that kernels of this CPU make no difference."""
    logs = tmp_path_factory.mktemp("logs")
    engine = Engine(
        name="vllm", python=python("vllm"), logs=logs, limit_seconds=1800, environment=environment(logs / "cache")
    )
    stored = {name: Release.open(path).reference for name, path in folders.items() if "twin" not in name}
    for name in TWINS:
        stored[f"{name} twin"] = stored[name]
    requests = [
        vllm.request(path, [reference.tokens], tokens=2, exact_experts=True)
        for name, path in folders.items()
        if (reference := stored[name]) is not None
    ]
    answers = vllm.ask_each(engine, requests, "families")
    pairs = zip(folders, answers, strict=True)
    return {name: Ran(answer, list(stored[name].logprobs)) for name, answer in pairs}


def test_enough_is_proven() -> None:
    assert len(LOADED) >= 20 and len(RUN) >= 8
    assert {*TWINS, *GPTQ, SWAPPED} <= {*RUN}


@pytest.mark.parametrize("name", [*LOADED, *(f"{name} gptq" for name in GPTQ)])
def test_every_parameter_is_written(ran: Mapping[str, Ran], name: str) -> None:
    """By the check that `verify` makes, over what was loaded, whatever came after."""
    answer = ran[name].answer
    assert answer.content["loads"], answer.failure
    check = vllm.check_written(answer)
    assert check.status is Status.PASS, check.evidence
    assert all(load["parameters"] > 20 for load in answer.content["loads"].values())


@pytest.mark.parametrize("name", [name for name in RUN if name not in TWINS])
def test_it_runs(ran: Mapping[str, Ran], name: str) -> None:
    """Within twice the largest noise of the twins, Gemma 4's apart: its routers flip more often than all others'."""
    limit = 2 * max(noise(ran, twin) for twin in TWINS if twin != "gemma4")
    assert apart(ran[name].scores, ran[name].stored) < limit


def test_the_version_is_the_one_that_is_named(ran: Mapping[str, Ran]) -> None:
    assert all(VLLM in ran[name].answer.content["engine"] for name in RUN)


@pytest.mark.parametrize("name", TWINS)
def test_it_runs_as_its_twin_does(ran: Mapping[str, Ran], name: str) -> None:
    """Nearer to it than BF16 arithmetic is to other BF16 arithmetic, and no further from what quantize stored."""
    release, twin, stored = ran[name].scores, ran[f"{name} twin"].scores, ran[name].stored
    assert apart(release, twin) < noise(ran, name)
    assert apart(release, stored) < 1.5 * noise(ran, name)


@pytest.mark.parametrize("name", GPTQ)
def test_gptq_computes_what_compressed_tensors_does(ran: Mapping[str, Ran], name: str) -> None:
    assert ran[f"{name} gptq"].scores == ran[name].scores


def test_two_experts_in_each_others_place_are_seen(ran: Mapping[str, Ran]) -> None:
    """What all this would not see, it would not prove."""
    assert apart(ran["swapped"].scores, ran[SWAPPED].stored) > 2 * noise(ran, SWAPPED)
