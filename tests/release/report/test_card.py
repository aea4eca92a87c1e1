"""The card: what the Hub reads from it, what it says and does not say, and that nothing can be smuggled into it."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from huggingface_hub import ModelCard, parse_eval_result_entries
from huggingface_hub.repocard_data import model_index_to_eval_results
from markdown_it import MarkdownIt

import releases
from command_line import invoke
from fourfold.datatypes import FourfoldError
from fourfold.recipe import load_recipe
from fourfold.release.contents import named_repo
from fourfold.release.report.about import About, licence
from fourfold.release.report.card import card
from fourfold.release.report.charts import heat_values
from fourfold.release.report.page import page
from fourfold.release.report.recommend import recommend
from fourfold.release.report.records import Records
from hostile import HOSTILE, Change

ABOUT = About(name="me/small-int4", base_model="Qwen/Small")
SPREAD = {"mean": 0.25, "p50": 0.2, "p90": 0.3, "p99": 0.4}
LEVEL = {
    "concurrency": 4, "seconds": 9.0, "requests": {"asked": 16, "ok": 16, "failed": {}, "said": {}},
    "prompt_tokens": 99, "output_tokens": 1890, "output_tokens_per_second": 210.5,
    "decode_tokens_per_second": SPREAD | {"p50": 61.5}, "time_to_first_token": SPREAD, "time_per_output_token": None,
    "time_between_chunks": SPREAD, "latency": SPREAD, "client_core_share_at_100_tokens_per_second": None,
    "acceptance": {"rate": 0.81, "mean_length": 2.62, "by_position": [0.93, 0.85]},
}  # fmt: skip
BENCH = {
    "url": "http://localhost:8000", "fourfold": "0.1.0", "metrics": "read", "card": None,
    "model": "small", "engine": "vllm", "pool": {"tokens": 1234},
    "load": {"output_tokens": 128, "temperature": 0, "prompts": "built-in"}, "levels": [LEVEL],
}  # fmt: skip


def write_card(folder: Path, about: About = ABOUT) -> str:
    records = Records.open(folder)
    return card(
        records, about.of(records.state.source.hub), recommend(records, about), {"figures/errors.png": "errors"}
    )


def fold(text: str, title: str) -> str:
    """What a folded part of the card holds."""
    found = re.search(rf"<summary>{re.escape(title)}.*?</summary>(.*?)</details>", text, re.DOTALL)
    assert found, title
    return found[1]


def part(text: str, title: str) -> str:
    """What is under a heading, down to the next of its rank."""
    marks = re.search(rf"^(#+) {re.escape(title)}$", text, re.MULTILINE)
    assert marks, title
    rest = text[marks.end() :]
    following = re.search(rf"^#{{2,{len(marks[1])}}} ", rest, re.MULTILINE)
    return rest[: following.start()] if following else rest


def test_the_hub_reads_its_front_matter(finished: Path) -> None:
    data = ModelCard(write_card(finished)).data.to_dict()
    assert data["base_model"] == "Qwen/Small"
    assert data["base_model_relation"] == "quantized"
    assert data["pipeline_tag"] == "image-text-to-text"
    assert data["library_name"] == "transformers"
    assert {"int4", "gptq", "compressed-tensors", "vllm", "moe"} <= set(data["tags"])
    name, results = model_index_to_eval_results(data["model-index"])
    assert name == "small-int4"
    summary = releases.read_json(finished / "metrics.json")["summary"]
    found = {result.metric_type: result.metric_value for result in results}
    assert found == pytest.approx(
        {
            "perplexity": summary["perplexity_release"],
            "kl_divergence": summary["kl_mean"],
            "top1_agreement": summary["top1_agreement"],
        },
        rel=1e-5,
    )
    assert results[0].dataset_args == {"window": 128, "stride": 128, "windows": 2}


def test_it_says_what_guidance_left_of_the_error(release: Path, change: Change) -> None:
    assert "Guidance" not in write_card(release)
    measured = {"down": 0.66}, {"down": 0.61, "gate_up": 0.725}
    layers = [{"layer": layer, "predicted": 0.7, "measured": found} for layer, found in enumerate(measured)]
    change("fourfold.json", lambda state: state.update(guidance={"tokens": 512, "layers": layers}))
    said = fold(write_card(release), "Guidance")
    assert re.search(r"\| 0 \| 0.70 \| 0.66 \| +\|", said) and re.search(r"\| 1 \| 0.70 \| 0.61 \| 0.7[23] \|", said)
    change("fourfold.json", lambda state: state.update(guidance={"tokens": 512, "layers": [{"layer": 0}]}))
    with pytest.raises(FourfoldError, match=r"fourfold.json: guidance.layers.0.predicted: missing"):
        Records.open(release)


def test_it_has_what_the_records_say(finished: Path) -> None:
    text, state = write_card(finished), releases.read_json(finished / "fourfold.json")
    quantized = part(text, "What is quantized")
    assert re.search(r"routed experts \| int4 \| 72 ", quantized), "24 projections, each of three tensors"
    stored = releases.tensors(finished)
    counts = [int(row.split("|")[3].replace(",", "")) for row in quantized.split("\n") if "| kept |" in row]
    assert sum(counts) + 72 == len(stored)
    quality = part(text, "Quality")
    assert f"{state['metrics']['perplexity_release']:.4f}" in quality
    assert "2 windows, 128 tokens per window, stride 128" in quality and " ± " in quality
    assert "CC BY-SA 3.0" in fold(text, "Calibration")
    made = fold(text, "How it was made")
    assert state["versions"]["torch"] in made and "peak memory" in made
    for digest in (state["identity"]["recipe"], state["output"]["content"], state["source"]["content"]):
        assert digest in fold(text, "Reproduce")
    assert len(re.findall(r"^\| \d ", fold(text, "Layers"), re.MULTILINE)) == 2
    assert "sha256 | pass" in fold(text, "What was verified")
    assert "MTP split" in fold(text, "What was verified")


def test_serving_commands_are_those_of_serve(finished: Path) -> None:
    serving = part(write_card(finished), "Run it")
    vllm = re.search(r"^vllm serve .*$", serving, re.MULTILINE)
    assert vllm
    assert vllm[0].startswith("vllm serve me/small-int4 --served-model-name me/small-int4 ")
    assert '"method":"mtp"' in vllm[0]
    assert "moe_wna16" not in serving, "compressed-tensors: engines read the method from config.json"
    assert len(re.findall(r"^python3 -m sglang.launch_server", serving, re.MULTILINE)) == 2
    assert named_repo(write_card(finished)) == "me/small-int4", "what publish compares with its REPO"
    assert str(finished) not in serving, "the publisher's folders are nobody's business"


@pytest.mark.parametrize("engine", ["SGLang", "vLLM"])
def test_the_verified_engine_is_first(release: Path, change: Change, engine: str) -> None:
    facts = {"engine": f"{engine} 0.5.23", "torch": "2", "device": "cpu"}
    change("verify.json", lambda verdict: verdict.update(engine=facts))
    titles = re.findall(r"^### (\w+)", part(write_card(release), "Run it"), re.MULTILINE)
    assert titles[0] == engine and {"vLLM", "SGLang", "transformers"} <= set(titles)


def test_the_first_screen_answers(finished: Path) -> None:
    """Quality, the weakest projection and how to run it come before all else; details are folded."""
    text = write_card(finished)
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == [
        "Quality", "Run it", "What is quantized", "Known limits", "Details", "Licence",
    ]  # fmt: skip
    row = max(Records.open(finished).projections, key=lambda row: row.error_over_rtn)
    weakest = f"layer {row.layer} expert {row.expert} {row.projection}, {row.error_over_rtn:.2f} of RTN's output error"
    assert f"| weakest | {weakest} |" in text.partition("## Quality")[0]
    folded = part(text, "Details")
    assert folded.count("<details>") == folded.count("</details>") == len(re.findall("<summary>", folded)) >= 8
    assert not re.sub(r"<details>.*?</details>", "", folded, flags=re.DOTALL).strip(), "nothing stands between them"


def test_commands_for_other_formats(finished: Path) -> None:
    """The engines that have this architecture, by the commands that make and prove their files."""
    _, _, section = write_card(finished).partition("### Other formats")
    assert "fourfold convert ./release ./release-gguf --format gguf" in section
    assert "fourfold verify ./release-mlx --source ./release --engine mlx" in section


def test_what_is_missing_is_named_and_nothing_is_made_up(release: Path, change: Change) -> None:
    change("fourfold.json", lambda state: state["source"].update(hub=None, terms={}))
    for name in ("metrics.json", "verify.json"):
        (release / name).unlink()
    text = write_card(release, About(name="small"))
    data = ModelCard(text).data.to_dict()
    assert "model-index" not in data and "base_model" not in data and "language" not in data
    assert part(text, "Quality").strip().startswith("Not measured.")
    assert fold(text, "What was verified").strip() == "Not verified."
    assert "Serving speed" not in text and "Drafts" not in text and "Tasks" not in text
    limits = part(text, "Known limits")
    for command in ("fourfold evaluate", "fourfold verify OUT`", "--engine vllm", "fourfold bench"):
        assert command in limits
    assert "| base model | not stated |" in text


def test_a_verdict_on_other_bytes_is_not_shown(release: Path, change: Change) -> None:
    change("verify.json", lambda verdict: verdict.update(content="0" * 64))
    text = write_card(release)
    assert "verify.json is for other bytes" in text
    assert fold(text, "What was verified").strip() == "Not verified."


def test_a_failed_check_is_said_first(release: Path, change: Change) -> None:
    def fail(verdict: Any) -> None:
        verdict["passed"] = False
        verdict["checks"][0]["status"] = "fail"

    change("verify.json", fail)
    text = write_card(release)
    assert "| verified | FAILED: files, source |" in text
    assert "Verification failed: index" in part(text, "Known limits")


def test_requests_at_once_are_said(release: Path, change: Change) -> None:
    load = {"level": "engine", "name": "under load", "status": "pass", "evidence": "none", "data": {"at_once": 16}}
    change("verify.json", lambda verdict: verdict["checks"].append(load))
    assert "| verified | passed: files, source, 16 requests at once |" in write_card(release)


def test_bench_and_drafts_are_shown_where_they_were_measured(release: Path, change: Change) -> None:
    (release / "bench.json").write_text(json.dumps(BENCH), encoding="utf-8")
    rule = {"by_position": [0.75, 0.5], "mean_length": 2.25, "interval": [2.1, 2.4]}
    drafts = {
        "protocol": {"prompts": 8, "steps": 2, "text": "its own"},
        "source": {"greedy": rule, "sampled": rule},
        "release": {"greedy": rule, "sampled": rule},
    }
    change("metrics.json", lambda metrics: metrics.update(drafts=drafts, measured_by="evaluate"))
    text = write_card(release)
    assert "| this release | greedy | 75.0% / 50.0% | 2.250 | 2.100 to 2.400 |" in text
    assert "| 4 | 16/16 | 210.5 | 61.5 | 200 / 400 | 81.0% | 2.62 |" in text
    assert "fourfold bench URL" not in part(text, "Known limits")


def test_the_same_inputs_give_the_same_card(finished: Path) -> None:
    assert write_card(finished) == write_card(finished)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Apache License\n  Version 2.0, January 2004", "apache-2.0"),
        ("MIT License\n\nPermission is hereby granted, free of charge, to", "mit"),
        ("Some other licence", "other"),
        (None, "unknown"),
    ],
)
def test_a_licence_is_read_and_not_guessed(release: Path, change: Change, text: str | None, name: str) -> None:
    change("fourfold.json", lambda state: state["source"].update(terms={}))
    (release / "LICENSE").unlink()
    if text is not None:
        (release / "LICENSE").write_text(text, encoding="utf-8")
    assert licence(Records.open(release), ABOUT).name == name
    assert ModelCard(write_card(release)).data.to_dict()["license"] == name


def test_terms_of_the_source_are_those_of_its_card(release: Path, change: Change) -> None:
    """The card's before a LICENSE file's text, the publisher's own word before both."""
    stated = {"license": "other", "license_name": "their-own", "license_link": "LICENSE", "language": ["en", "zh"]}
    change("fourfold.json", lambda state: state["source"].update(terms=stated))
    data = ModelCard(write_card(release)).data.to_dict()
    assert {name: data[name] for name in stated} == stated
    said = ModelCard(write_card(release, About(name="x", licence="mit"))).data.to_dict()
    assert said["license"] == "mit" and "license_name" not in said


def test_base_model_and_licence_of_a_source_in_the_hubs_cache(finished: Path) -> None:
    """Without an option: the folder's place has the name, another snapshot the card. --base-model comes first."""
    data = ModelCard(write_card(finished, About(name="x"))).data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("Qwen/FromTheHub", "quantized")
    assert (data["license"], data["language"]) == ("apache-2.0", ["en"])
    assert ModelCard(write_card(finished)).data.to_dict()["base_model"] == "Qwen/Small"


def test_what_is_quantized_beside_the_experts_is_named(tmp_path: Path) -> None:
    """int8 of preset `compact`: by kind and bits, and parameters are those of the source all the same."""
    source = releases.make_source(tmp_path / "model")
    overrides = ["solver.passes=0", 'scheme.rest.attention="int8"', 'scheme.rest.head="int8"']
    overrides += ['scheme.rest.draft_experts="int4"']
    releases.run(source, tmp_path / "out", load_recipe(str(releases.write_recipe(tmp_path)), overrides))
    text, records = write_card(tmp_path / "out"), Records.open(tmp_path / "out")
    assert "Also quantized: attention (int8), output head (int8), draft experts (int4).\n\n|" in text
    assert "stays BF16: the engines build it unquantized" not in text
    assert "\n| draft head |" in fold(text, "Layers") and len(records.drafts()) == 12
    assert records.by_layer().keys() == {0, 1} == {cell["layer"] for cell in heat_values(records)}
    assert "| routed experts | int4 | 72 |" in text and "| output head | int8 | 3 |" in text
    assert records.parameters()[0] == sum(tensor.numel() for tensor in releases.tensors(source).values())


def test_parameters_and_experts_are_those_of_the_source(finished: Path) -> None:
    """Counted from the source's own tensors; one token runs 2 of 4 experts, no vision tower and no draft head."""
    source = finished.parent / "models--Qwen--FromTheHub" / "snapshots" / "b"
    shapes = {name: tensor.shape for name, tensor in releases.tensors(source).items()}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    routed = sum(size for name, size in sizes.items() if ".mlp.experts." in name and not name.startswith("mtp."))
    apart = sum(size for name, size in sizes.items() if name.startswith(("mtp.", "model.visual.")))
    total = sum(sizes.values())
    records = Records.open(finished)
    assert routed and apart and records.parameters() == (total, total - apart - routed // 2)
    said = f"{total / 1e6:.3g}M total, {(total - apart - routed // 2) / 1e3:.3g}K active per token"
    assert f"| parameters | {said} |" in write_card(finished) and f"<dd>{said}</dd>" in page(records, ABOUT)
    width = next(shape[1] for name, shape in shapes.items() if name.endswith("shared_expert.down_proj.weight"))
    routing = "4 in each of 2 layers, 2 active per token"
    assert re.search(rf"\| experts \| {routing}, width \d+; shared expert: width {width} \|", write_card(finished))


def test_the_machine_is_named_with_its_memory(release: Path, change: Change) -> None:
    recorded = releases.read_json(release / "fourfold.json")["device_memory_bytes"]
    assert set(recorded) == {"cpu"} and recorded["cpu"] > 10**9
    more = {"devices": {"cpu": "AMD EPYC", "cuda:0": "NVIDIA H200"}, "device_memory_bytes": {"cuda:0": 150 * 10**9}}
    change("fourfold.json", lambda state: state.update(more))
    assert "| machine | cpu: AMD EPYC; cuda:0: NVIDIA H200, 150 GB |" in write_card(release)


def test_perplexity_names_its_text_and_windows(release: Path, change: Change) -> None:
    """After evaluate measured another text, quantize's is beside it."""
    said = r"^- Perplexity [\d.]+, source [\d.]+: heldout.txt, 2 windows of 128 tokens, not overlapping\.$"
    lines = re.findall("^- Perplexity .*", write_card(release), re.MULTILINE)
    assert len(lines) == 1 and re.match(said, lines[0])

    def evaluated(metrics: Any) -> None:
        metrics["measured_by"], metrics["summary"]["perplexity_release"] = "evaluate", 7.25
        metrics["protocol"] |= {"text": "wikitext-2-raw-test.parquet", "windows": 64, "stride": 64}

    change("metrics.json", evaluated)
    raw, first = re.findall("^- Perplexity .*", write_card(release), re.MULTILINE)
    assert raw.startswith("- Perplexity 7.2500, source ") and first == lines[0]
    assert raw.endswith(": wikitext-2-raw-test.parquet, 64 windows of 128 tokens, stride 64.")


def test_leaderboards_get_benchmarks_alone(release: Path, change: Change) -> None:
    """.eval_results as huggingface_hub reads it: a task of a registered dataset, none that was measured otherwise."""
    gsm8k = {
        "figures": {"exact_match,strict": 0.5, "exact_match_stderr,strict": 0.01, "exact_match,flexible": 0.6},
        "benchmark": {"dataset": "openai/gsm8k", "task": "gsm8k"}, "shots": 5,
    }  # fmt: skip
    tasks = {"lm_eval": "0.4.13", "tasks": {"toy": {"figures": {"acc,none": 0.25}}, "gsm8k": gsm8k}}
    change("metrics.json", lambda metrics: metrics.update(tasks=tasks))
    assert invoke("report", str(release)).exit_code == 0
    written = release / ".eval_results" / "lm-eval.yaml"
    (entry,) = parse_eval_result_entries(yaml.safe_load(written.read_text(encoding="utf-8")))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("openai/gsm8k", "gsm8k", 50)
    assert entry.notes == "lm-eval 0.4.13, exact_match,strict, 5 shots; int4 weights"
    results = ModelCard.load(release / "README.md").data.eval_results
    types = {(result.dataset_type, result.metric_type) for result in results or ()}
    assert {("openai/gsm8k", "exact_match"), ("toy", "acc")} < types and "accuracy" not in dict(types).values()
    change("metrics.json", lambda metrics: metrics.pop("tasks"))
    assert invoke("report", str(release)).exit_code == 0 and not written.exists()


def poison(state: Any) -> None:
    state["calibration"]["sources"][0] |= {"name": HOSTILE, "licence": HOSTILE}
    state["calibration"]["notes"] = [HOSTILE]
    state["source"]["terms"] = {"license": HOSTILE, "language": [HOSTILE]}
    state["devices"] = {"cpu": HOSTILE}
    state["versions"]["torch"] = HOSTILE
    state["output"]["shards"] = {HOSTILE: {"bytes": 1, "sha256": HOSTILE}}
    state["finished_at"] = HOSTILE


def test_nothing_can_be_smuggled_into_a_card(release: Path, change: Change) -> None:
    change("fourfold.json", poison)
    change("metrics.json", lambda metrics: metrics["protocol"].update(text=HOSTILE))
    change("verify.json", lambda verdict: verdict["checks"][0].update(name=HOSTILE, evidence=HOSTILE))
    (release / "bench.json").write_text(json.dumps(BENCH | {"model": HOSTILE, "engine": HOSTILE}), encoding="utf-8")
    text = write_card(release)
    data = ModelCard(text).data.to_dict()
    assert data["license"] == HOSTILE and data["base_model"] == "Qwen/Small"
    assert data["model-index"][0]["results"][0]["dataset"]["name"] == HOSTILE, "YAML gives back what went in"
    shown = MarkdownIt("commonmark").enable("table").render(text.split("\n---\n", 1)[1])
    tags = set(re.findall(r"<\s*/?([a-zA-Z][a-zA-Z0-9]*)", shown))
    ours = set("h1 h2 h3 p table thead tbody tr th td ul li code pre a img details summary strong".split())
    assert tags <= ours
    assert set(re.findall(r'src="([^"]*)"', shown)) == {"figures/errors.png"}
    links = set(re.findall(r'href="([^"]*)"', shown))
    allowed = ("https://huggingface.co/Qwen/Small", "https://arxiv.org/", "quant_log", "report.html")
    assert all(link.startswith(allowed) for link in links)
    assert "alert(1)" in shown, "it is shown, as text"
    assert "49" not in fold(text, "Calibration"), "and no template"


@pytest.mark.parametrize("name", ["a b/c", "../x", "o/n/x", "o/<b>", "o/n\nlicense: mit", "-/x"])
def test_names_that_the_hub_does_not_take_are_refused(finished: Path, name: str) -> None:
    for about in (About(name="x", base_model=name), About(name=name)):
        with pytest.raises(FourfoldError, match="expected org/name"):
            about.of(None)


def test_a_repository_that_the_hub_does_not_take(finished: Path) -> None:
    for repo in ("not a repo!!", "me/ünï", "model"):
        done = invoke("report", str(finished), "--repo", repo)
        assert done.exit_code == 2 and f"--repo: got '{repo}', expected org/name" in done.stderr, done.output
    assert not (finished / "README.md").exists()


NUMBERS = {
    "metrics.json": (
        "summary.kl_mean", "summary.perplexity_ratio", "summary.positions", "intervals.kl_mean.0",
        "layers.0.hidden_error", "layers.1.router_agreement", "by_entropy.1.positions", "kl_histogram.2.from",
        "protocol.windows",
    ),
    "fourfold.json": ("source_tensor_bytes", "projections", "seconds.solve", "peak_memory_bytes.host",
                      "calibration.sources.0.tokens", "methods.gptq", "output.tensor_bytes", "metrics.kl_mean"),
    "bench.json": ("levels.0.output_tokens_per_second", "levels.0.acceptance.rate", "load.temperature"),
}  # fmt: skip


@pytest.mark.parametrize("value", [math.nan, -math.inf, "1.5", "<b>1</b>", [], {}, True], ids=str)
def test_no_number_is_anything_else(release: Path, value: object) -> None:
    """NaN, text and markup where a number belongs end in one error that names the key and the value."""
    (release / "bench.json").write_text(json.dumps(BENCH), encoding="utf-8")
    for name, keys in NUMBERS.items():
        text = (release / name).read_text(encoding="utf-8")
        for key in keys:
            content = json.loads(text)
            *path, last = (int(part) if part.isdigit() else part for part in key.split("."))
            functools.reduce(lambda found, part: found[part], path, content)[last] = value
            (release / name).write_text(json.dumps(content), encoding="utf-8")
            said = f"{name}: {key}: got {value!r}, expected "
            if isinstance(value, float):  # what JSON does not have
                said = f"{name}: not JSON (JSON is malformed: invalid "
            with pytest.raises(FourfoldError, match=re.escape(said)) as raised:
                Records.open(release)
            if isinstance(value, float):
                assert f'"{last}": ' in str(raised.value) or last == 0
            assert len(str(raised.value).splitlines()) == 1
        (release / name).write_text(text, encoding="utf-8")
    Records.open(release)


@pytest.mark.parametrize(
    ("name", "edit", "said"),
    [
        (
            "quant_log.csv",
            lambda text: re.sub(r"(gptq,)[\d.e-]+", r"\1nan", text),
            "line 2: weight_error: got nan, expected a",
        ),
        ("fourfold.json", lambda text: text.replace('mat": "c', 'mat": "../c'), "format: got '../compressed-te"),
        ("fourfold.json", lambda text: text.replace('mat": "compressed-tensors"', 'mat": "gptq"'), "as in recipe"),
    ],
)
def test_a_file_not_as_written_is_named(release: Path, name: str, edit: Callable[[str], str], said: str) -> None:
    path = release / name
    path.write_text(edit(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(FourfoldError, match=re.escape(said)) as raised:
        Records.open(release)
    assert str(path) in str(raised.value)
