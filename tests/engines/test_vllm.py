"""Level 3 of verify with real vLLM: each storage format with MTP beside its source, and releases that must fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from msgspec import convert
from torch import Tensor

import releases
from broken import Copy
from fourfold import api
from fourfold.records.results import Check, Status
from fourfold.release.release import Release
from fourfold.release.verify import run as verify
from fourfold.release.verify import vllm
from fourfold.release.verify.engine import Engine, environment
from fourfold.release.verify.load import Loaded, judge_load

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "vision"))
from scenes import write

pytestmark = pytest.mark.engine

MTP_TENSOR = "mtp.layers.0.mlp.experts.3.up_proj.weight"
EXPERT = "model.language_model.layers.1.mlp.experts.5."
CT, GPTQ, V2 = releases.FORMATS
Made, Find, Broken = Callable[[str], Path], Callable[[str], Path], Callable[[str], Copy]


@pytest.fixture
def engine(python: Find, tmp_path: Path) -> Engine:
    found = python("vllm")
    return Engine(
        name="vllm", python=found, logs=tmp_path, limit_seconds=900, environment=environment(tmp_path / "cache")
    )


def ask(engine: Engine, folder: Path, title: str, **options: Any) -> vllm.Answer:
    return vllm.ask(engine, folder, verify.prompts(Release.open(folder)), title, **options)


def failed(out: Path) -> set[str]:
    """Names of checks that fail without an engine."""
    return {check.name for check in verify.verify(out).checks if check.status is Status.FAIL}


def test_images_are_seen_as_the_source_sees_them(python: Find, tmp_path: Path) -> None:
    """The trained vision model, calibrated on text and images: a prompt with an image in vLLM and in transformers."""
    model = Path(__file__).parents[2] / "benchmarks" / "vision" / "model"
    images = write(tmp_path / "scenes", 40, seed=3)
    (tmp_path / "images.toml").write_text(f"""
        [calibration]
        length = 128
        [[calibration.sources]]
        builtin = "math"
        rows = 8
        [[calibration.sources]]
        path = "{images}"
        kind = "image"
        rows = 8
        [heldout]
        windows = 2
        length = 128
        image_windows = 2
    """)
    api.quantize(model, tmp_path / "out", recipe=tmp_path / "images.toml", devices="cpu")
    verdict = api.verify(tmp_path / "out", source=model, engine="vllm", python=python("vllm"), timeout=15)
    found = {check.name: check for check in verdict.checks}
    assert verdict.passed, verdict
    assert [found[f"image prompt, {engine}"].status for engine in ("vLLM", "transformers")] == [Status.PASS] * 2


@pytest.mark.parametrize("form", releases.FORMATS)
def test_a_release_runs_as_its_source_does(made: Made, python: Find, example_model: Path, form: str) -> None:
    """The whole command: three starts of vLLM, and for compressed-tensors transformers with an image."""
    out = made(form)
    command = [sys.executable, "-m", "fourfold", "verify", out, "--source", example_model, "--engine", "vllm"]
    paths = {"PYTHONPATH": str(Path(__file__).parents[2] / "src"), "COLUMNS": "200"}
    done = subprocess.run(
        [*map(str, command), "--python", str(python("vllm")), "--timeout", "15"],
        capture_output=True,
        text=True,
        env={**os.environ, **paths},
        check=False,
    )
    verdict = json.loads((out / "verify.json").read_text())
    found = {check["name"]: check for check in verdict["checks"] if check["level"] == "engine"}
    kernels = verdict["engine"]["kernels"] if verdict["engine"] else []
    if form == V2 and "Using 'CPU' WNA16 MoE backend." in kernels:  # AMX: it reads v2's zero points as v1's
        assert found["log-probabilities"]["status"] == "fail"
        assert found["reference log-probabilities"]["status"] == "fail"
        return
    assert done.returncode == 0, done.stdout + done.stderr
    wanted = ["starts", "every parameter written", "same tokens with MTP", "drafts accepted", "log-probabilities",
              "reference log-probabilities"]  # fmt: skip
    assert [found[name]["status"] for name in wanted] == ["pass"] * 6
    assert found["reference log-probabilities"]["data"]["same_best"] > 50  # of 63
    assert found["image prompt, vLLM"]["status"] == "pass", found["image prompt, vLLM"]
    through = found["image prompt, transformers"]
    assert through["status"] == ("pass" if form == CT else "not run"), through
    loads = found["every parameter written"]["data"]["loads"]
    assert loads.keys() == {"Qwen3_5MoeForConditionalGeneration", "Qwen3_5MoeMTP"}
    assert loads["Qwen3_5MoeMTP"]["elements"] > 3_000_000  # 16 experts of 3 x 256 x 128 in BF16, and attention
    accepted = found["drafts accepted"]["data"]
    assert 0 < accepted["accepted_tokens"] <= accepted["draft_tokens"]
    assert len(accepted["accepted_by_position"]) == vllm.DRAFT_TOKENS
    facts = verdict["engine"]
    assert facts["engine"] == "vLLM 0.32.0"
    assert any("MoE backend" in line or "exact expert kernel" in line for line in facts["kernels"]), facts["kernels"]
    for name in ("start_seconds", "load_seconds", "kv_cache_tokens", "decode_tokens_per_second"):
        assert facts[name] > 0
    for text in ("every parameter written", "vLLM 0.32.0", "all checks passed"):
        assert text in done.stdout
    assert not [one for one in psutil.process_iter(["cmdline"]) if str(python("vllm")) in (one.info["cmdline"] or ())]


def under_load(answer: vllm.Answer) -> Check:
    assert not answer.failure, answer.failure
    return judge_load("under load", convert(answer.content["load"], Loaded), list)


def test_a_sound_release_under_load_with_drafts_and_without(made: Made, engine: Engine) -> None:
    out = made(CT)
    load = verify.load_request(out, 16, tokens=32)
    prompts = verify.windows(out)[:2]
    asked = [vllm.request(out, prompts, load=load, tokens=2, draft_tokens=drafts) for drafts in (vllm.DRAFT_TOKENS, 0)]
    for answer in vllm.ask_each(engine, asked, "sound"):
        check = under_load(answer)
        assert check.status is Status.PASS, check.evidence
        assert (check.data["tokens"], check.data["far"]) == (48 * 32, 0)
    assert check.data["alone_most"] > 0  # decoded and scored are two ways


def test_a_kernel_that_is_rarely_wrong_in_large_batches(
    made: Made, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = made(CT)
    monkeypatch.setenv("FAULT_SHARE", "0.05")
    monkeypatch.setattr(vllm, "SCRIPT", str(Path(__file__).parent / "faulty_vllm.py"))
    load = verify.load_request(out, 16, tokens=32)
    answer = vllm.ask(engine, out, verify.windows(out)[:2], "faulty", load=load, tokens=2, exact_experts=True)
    check = under_load(answer)
    assert answer.log.read_text().count("[fault]") > 10
    assert check.status is Status.FAIL and check.data["failed_prompts"], check


def test_what_vllm_leaves_unwritten_without_an_error(copy: Broken, engine: Engine) -> None:
    """Two faults in one start: a tensor of the draft head is missing, the scales of one expert are zero. And a third,
    which the files cannot show: codes as engines see them that read zero points wrong. The stored reference tells.
    """

    def change(tensors: dict[str, Tensor]) -> None:
        tensors.pop(MTP_TENSOR, None)
        for name in tensors:
            if name.endswith("weight_packed"):
                tensors[name] = releases.raise_codes(tensors[name])
            if name.startswith(EXPERT) and name.endswith("weight_scale"):
                tensors[name].zero_()

    out = copy(CT).tensors(change).folder
    answer = ask(engine, out, "broken", draft_tokens=vllm.DRAFT_TOKENS, noise=True)
    assert not answer.failure, answer.failure  # it loads, and runs
    stored = vllm.check_reference(answer.content, Release.open(out).reference)
    assert stored.status is Status.FAIL and stored.data["mean"] > 1.5 * stored.data["limit"], stored
    check = vllm.check_written(answer)
    assert check.status is Status.FAIL
    loads = answer.content["loads"]
    (unwritten,) = loads["Qwen3_5MoeMTP"]["unwritten"].items()
    assert "w13" in unwritten[0]
    assert unwritten[1] == f"{128 * 256:,} of {16 * 2 * 128 * 256:,}"
    assert {name.rpartition(".")[2] for name in loads["Qwen3_5MoeForConditionalGeneration"]["zero_scales"]} == {
        "w13_weight_scale", "w2_weight_scale",
    }  # fmt: skip
    assert failed(out) == {"tensors", "scales"}


def test_dynamic_without_the_mtp_rule(copy: Broken, engine: Engine) -> None:
    release = copy(GPTQ).json("config.json", lambda config: config["quantization_config"]["dynamic"].pop("-:.*mtp.*"))
    out = release.folder
    answer = ask(engine, out, "broken", draft_tokens=vllm.DRAFT_TOKENS)
    runs = vllm.Runs(plain=answer, drafting=answer, source=None)
    (check, *rest) = vllm.checks(runs, 0.001, Release.open(out).reference)
    assert check.status is Status.FAIL
    assert "has no parameter 'w2_weight'" in check.evidence
    assert {other.status for other in rest} == {Status.NOT_RUN}
    assert failed(out) == {"quantization_config"}


def test_v1_zero_points_under_gptq_v2(copy: Broken) -> None:
    """GPU kernels do not read them, so no engine here need notice: level 1 must."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if name.endswith("qzeros"):
                tensors[name].fill_(0x77777777)

    assert failed(copy(V2).tensors(change).folder) == {"zero points and shapes"}


def test_a_truncated_shard(copy: Broken, python: Find, example_model: Path) -> None:
    """Level 1 fails, and no engine is started over it."""
    out = copy(CT).folder
    with (out / "model-00004-of-00005.safetensors").open("rb+") as shard:
        shard.truncate(1_000_000)
    engine = Engine(name="vllm", python=python("vllm"), logs=out / ".fourfold", limit_seconds=900)
    verdict = verify.verify(out, model=example_model, engine=engine)
    assert {check.name for check in verdict.checks if check.status is Status.FAIL} == {"index"}
    assert not verdict.passed
    (skipped,) = (check for check in verdict.checks if check.level == "engine")
    assert skipped.status is Status.NOT_RUN


def test_the_exact_kernel_agrees_with_vllms_own(made: Made, engine: Engine) -> None:
    """The one that stands in where vLLM has no int4 kernel for the CPU."""
    reference = Release.open(made(GPTQ)).reference
    assert reference is not None
    exact = ask(engine, made(GPTQ), "exact", exact_experts=True)
    assert not exact.failure, exact.failure
    assert any("exact expert kernel" in line for line in vllm.kernels(exact))
    own = ask(engine, made(GPTQ), "own")
    assert not own.failure, own.failure
    stored = vllm.differences(exact.content["prompt_logprobs"][-1:], [reference.logprobs])
    assert stored[0] < 0.015  # the engine's own BF16 and nothing else
    mean, _ = vllm.differences(exact.content["prompt_logprobs"], own.content["prompt_logprobs"])
    assert mean < 0.03  # vLLM's kernels round activations to int8; wrong codes or scales make 0.06 and more
