"""Small checkpoints of every family through plan, quantize, verify and evaluate, and of sources that are not BF16."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import checkpoints
import families
import family_releases
import releases
from fourfold.api import evaluate, plan, verify
from fourfold.api import quantize as api_quantize
from fourfold.datatypes import Action, FourfoldError
from fourfold.formats import COMPRESSED_TENSORS
from fourfold.model.family import FAMILIES, TRANSFORMERS, Family
from fourfold.quantize.plan import make_plan
from fourfold.quantize.run import quantize
from fourfold.recipe import Recipe
from fourfold.release.release import Release
from fourfold.release.report.about import About
from fourfold.release.report.recommend import recommend
from fourfold.release.report.write import write
from fourfold.release.verify.source import OVER_RTN
from nextn import with_nextn

REFUSED = {
    "gpt_oss": "experts of gpt_oss have biases",
}
Make, Recipes = Callable[[str], Path], Callable[..., Recipe]
NAMES = [name for name in families.FAMILIES if name not in REFUSED]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    releases.write_recipe(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A family's small checkpoint, made once."""
    folder = tmp_path_factory.mktemp("families")

    def make(name: str) -> Path:
        return folder / name if (folder / name).exists() else family_releases.make_source(folder / name, name)

    return make


@pytest.fixture(scope="module")
def release(source: Make, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """The release of a family's small checkpoint, made once."""
    folder = tmp_path_factory.mktemp("releases")

    def make(name: str) -> Path:
        out = folder / name
        return out if out.exists() else family_releases.make_release(out, source(name), texts)

    return make


@pytest.fixture
def recipe(texts: Path) -> Recipes:
    return lambda preset="fast", *settings: family_releases.recipe(texts, preset, *settings)


def test_every_family_has_a_case() -> None:
    cases = {name.partition("+")[0] for name in NAMES}
    assert set(FAMILIES) == cases


@pytest.mark.parametrize("name", ["glm4_moe", "gemma4", "nemotron_h", "qwen3_vl_moe"])
def test_a_plan_claims_every_tensor_once(source: Make, recipe: Recipes, name: str) -> None:
    plan = make_plan(source(name), recipe())
    claimed = [claim.header.name for part in plan.parts for claim in part.claims]
    assert sorted(claimed) == sorted(plan.source.headers)
    experts = [one for one in plan.source.blueprint.experts if one is not None]
    assert plan.projections == sum(one.count * len(one.projections) for one in experts)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_release_is_what_quantize_measured(source: Make, release: Make, name: str) -> None:
    """Read back from disk, its KL divergence is that of the stream that was quantized: names, order and arithmetic."""
    model, out = source(name), release(name)
    verdict = verify(out, source=model)
    # Random experts with 128 tokens move far from the nearest codes: that ratio is of trained ones.
    failed = [check for check in verdict.checks if str(check.status) == "fail" and check.name != OVER_RTN]
    assert failed == []
    measured = json.loads((out / "fourfold.json").read_text())["metrics"]
    windows, length = family_releases.TOKENS
    found = evaluate(out, source=model, windows=windows, length=length, drafts=False).figures
    assert found.kl_mean == pytest.approx(measured["kl_mean"], rel=1e-6)
    assert found.perplexity_source == pytest.approx(measured["perplexity_source"], rel=1e-9)


@torch.no_grad()
def transformers_equals(release: Path, twin: Path, model_class: Any) -> bool:
    """Whether transformers loads a release, experts and all, and gives the logits of its twin in BF16."""
    token_RT = torch.randint(3, 480, (2, 40), generator=torch.Generator().manual_seed(3))
    found = []
    for folder in (release, twin):
        try:
            model, loaded = model_class.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
        except (RuntimeError, ValueError):
            assert folder == release  # its twin loads
            return False
        if loaded["missing_keys"]:  # experts stay random
            return False
        found.append(model.eval()(input_ids=token_RT, use_cache=False).logits)
    return torch.equal(*found)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_transformers_loads_a_release_or_the_card_says_why_not(release: Make, tmp_path: Path, name: str) -> None:
    """Through its own decompression. The families are those that docs/models.md names, no more and no less."""
    out, (model_class, _) = release(name), families.settings(name)
    equal = transformers_equals(out, family_releases.make_twin(tmp_path / "twin", out), model_class)
    problem = Release.open(out).transformers_problem
    assert equal == (not problem) == (TRANSFORMERS in FAMILIES[name.partition("+")[0]].proven), problem
    assert TRANSFORMERS.endswith(transformers.__version__.rpartition(".")[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_quantized_is_refused_by_name(
    source: Make, recipe: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(FAMILIES, name, Family(model_type=name, title=""))
    with pytest.raises(FourfoldError, match=REFUSED[name]):
        quantize(source(name), tmp_path / "out", recipe())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma4", "granitemoe", "cohere2_moe"])
def test_guidance_says_where_it_is_not_available(source: Make, recipe: Recipes, tmp_path: Path, name: str) -> None:
    with pytest.raises(FourfoldError, match="guidance is not available"):
        quantize(source(name), tmp_path / "out", recipe("guided", "guidance.sites=down", "guidance.tokens=128"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["glm4_moe", "gemma4", "granitemoe", "glm_moe_dsa"])
def test_a_run_that_was_cut_off_goes_on(source: Make, recipe: Recipes, tmp_path: Path, name: str) -> None:
    """Added, run again, times a constant, and with what layers carry: the same bytes as in one go."""
    model = source(name)
    quantize(model, tmp_path / "whole", recipe())

    class CutOff(Exception):
        pass

    def stop(event: object) -> None:
        if getattr(event, "kind", "") == "layer" and getattr(event, "layer", -1) == 2:
            raise CutOff

    with pytest.raises(CutOff):
        quantize(model, tmp_path / "parts", recipe(), progress=stop)
    quantize(model, tmp_path / "parts", recipe())
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes(), path.name


@pytest.mark.slow
def test_a_card_without_commands(source: Make, recipe: Recipes, tmp_path: Path) -> None:
    """Of a model whose cache is not known from config.json."""
    quantize(source("nemotron_h"), tmp_path / "out", recipe())
    write(tmp_path / "out", About(name="org/model", base_model=None, licence=None), recommend)
    assert "vllm serve" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_a_draft_layer_past_the_last_is_kept_and_measured(
    recipe: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit in the release, one draft a step on what each model writes."""
    model, out = tmp_path / "model", tmp_path / "out"
    with_nextn(model, "glm4_moe", monkeypatch, checkpoints.VOCABULARY)
    for file in checkpoints.TOKENIZER_FILES:
        shutil.copy(checkpoints.EXAMPLE / file, model / file)
    quantize(model, out, recipe())
    assert verify(out, source=model).passed
    kept = {name: value for name, value in releases.tensors(out).items() if name.startswith("model.layers.4.")}
    source = {name: value for name, value in releases.tensors(model).items() if name.startswith("model.layers.4.")}
    assert kept.keys() == source.keys() and all(torch.equal(kept[name], source[name]) for name in source)
    ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    assert r"re:.*model\.layers\.4.*" in ignored
    found = evaluate(out, source=model, windows=2, length=64, drafts=True).to_json()["drafts"]
    assert (found["protocol"]["steps"], found["source"]["consistent"]) == (1, 1.0)
    for one in (found["source"], found["release"]):
        assert len(one["greedy"]["by_position"]) == 1 and one["positions"] == 2 * 11


def test_an_architecture_that_no_test_proves(
    source: Make, recipe: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is rehearsed by plan; quantize wants to be asked, and the card says so."""
    monkeypatch.delitem(FAMILIES, "olmoe")
    model, out, seen = source("olmoe"), tmp_path / "out", list[str]()
    plan(model, recipe=recipe(), progress=lambda event: seen.append(event.stage))
    assert "rehearse" in seen
    with pytest.raises(FourfoldError, match=r"olmoe is not among the architectures .*add --derived to quantize it"):
        api_quantize(model, out, recipe=recipe())
    assert not out.exists()
    api_quantize(model, out, recipe=recipe(), derived=True)
    write(out, About(name="org/model", base_model=None, licence=None), recommend)
    assert "not covered by fourfold's tests" in (out / "README.md").read_text()


@pytest.mark.slow
def test_a_card_where_transformers_does_not_load_a_release(release: Make) -> None:
    out = release("gemma4")
    write(out, About(name="org/model", base_model=None, licence=None), recommend)
    card = (out / "README.md").read_text()
    assert "as stacks alone" in card and "from_pretrained" not in card


# ---- sources that are not BF16


def as_fp8(name: str, weight_NK: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """A matrix in FP8 with a scale for each block of 128 x 128, and what it stands for in BF16."""
    rows, columns = weight_NK.shape
    generator = torch.Generator().manual_seed(rows * columns)
    scale = torch.rand(-(-rows // 128), -(-columns // 128), generator=generator) * 0.01 + 0.01
    full = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    codes = (weight_NK.float() / full).to(torch.float8_e4m3fn)
    return {name: codes, f"{name}_scale_inv": scale}, (codes.float() * full).to(torch.bfloat16)


def converted(model: Path, folder: Path, quantization: dict[str, object] | None, tensors: dict[str, Tensor]) -> Path:
    shutil.copytree(model, folder)
    save_file(tensors, next(folder.glob("*.safetensors")))
    checkpoints.edit_json(
        folder / "config.json", lambda raw: raw.update(quantization_config=quantization) if quantization else None
    )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek_v3", "minimax_m2"])
def test_an_fp8_source_gives_the_release_of_its_bf16_twin(
    source: Make, recipe: Recipes, tmp_path: Path, name: str
) -> None:
    model = source(name)
    stored, twin = dict[str, Tensor](), dict[str, Tensor]()
    for key, value in load_file(next(model.glob("*.safetensors"))).items():
        if value.ndim == 2 and ".layers." in key and "gate.weight" not in key:
            parts, twin[key] = as_fp8(key, value)
            stored |= parts
        else:
            stored[key] = twin[key] = value
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    fp8 = converted(model, tmp_path / "fp8", settings, stored)
    bf16 = converted(model, tmp_path / "bf16", None, twin)
    quantize(fp8, tmp_path / "from-fp8", recipe())
    quantize(bf16, tmp_path / "from-bf16", recipe())
    for path in (tmp_path / "from-bf16").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "from-fp8" / path.name).read_bytes(), path.name
    configs = [(tmp_path / out / "config.json").read_bytes() for out in ("from-fp8", "from-bf16")]
    assert configs[0] == configs[1]
    write(tmp_path / "from-fp8", About(name="org/model", base_model=None, licence=None), recommend)
    assert "FP8, dequantized when read" in (tmp_path / "from-fp8" / "README.md").read_text()
    verdict = verify(tmp_path / "from-fp8", source=fp8)
    assert [check for check in verdict.checks if str(check.status) == "fail"] == []


@pytest.mark.slow
def test_an_int4_release_can_be_quantized_again(source: Make, recipe: Recipes, tmp_path: Path) -> None:
    """With a warning: it is for models that are published in nothing else."""
    model = source("qwen3_moe")
    quantize(model, tmp_path / "once", recipe())
    plan = make_plan(tmp_path / "once", recipe())
    assert any("quantized a second time" in warning for warning in plan.warnings)
    assert plan.source.kind == "int4" and plan.source.format is COMPRESSED_TENSORS
    assert all(claim.header.dtype == "BF16" for part in plan.parts for claim in part.claims
               if claim.action is Action.QUANTIZE)  # fmt: skip
    told: list[tuple[str, str]] = []
    twice = tmp_path / "twice"
    quantize(tmp_path / "once", twice, recipe(), progress=lambda event: told.append((event.kind, event.text)))
    warned = next(place for place, (_, text) in enumerate(told) if "quantized a second time" in text)
    assert warned < next(place for place, (kind, _) in enumerate(told) if kind == "layer")
    assert not [check for check in verify(tmp_path / "twice", source=tmp_path / "once").checks
                if str(check.status) == "fail"]  # fmt: skip
