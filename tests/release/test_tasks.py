"""lm-eval: the command line that it is given, its results file, and the package itself where it is installed."""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from msgspec import to_builtins

from fourfold.datatypes import FourfoldError
from fourfold.records.results import Benchmark
from fourfold.release import tasks
from fourfold.release.suite import Servers
from fourfold.release.tasks import Tasks

INSTALLED = importlib.util.find_spec("lm_eval") is not None
TOY = """
task: toy
dataset_path: json
dataset_kwargs: {{data_files: {{test: {questions}}}}}
test_split: test
output_type: generate_until
doc_to_text: "Question: {{{{q}}}}\\nAnswer: "
doc_to_target: "{{{{a}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 3}}
"""


class Answers(BaseHTTPRequestHandler):
    """A server that speaks enough of OpenAI's protocol and answers every question with 2."""

    models: object = {"object": "list", "data": [{"id": "toy-model"}]}
    asked: list[dict[str, Any]]

    def do_GET(self) -> None:
        self.reply(self.models if self.path == "/v1/models" else {})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.asked.append(asked)
        prompts = asked["prompt"] if isinstance(asked["prompt"], list) else [asked["prompt"]]
        self.reply({"choices": [{"index": i, "text": "2", "finish_reason": "stop"} for i in range(len(prompts))]})

    def reply(self, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    Answers.asked = []
    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if lm-eval were there: what is asked of the server before it is run."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


@pytest.mark.parametrize("tail", ["", "/", "/v1", "/v1/"])
def test_the_servers_model_is_asked_for(url: str, installed: None, tail: str) -> None:
    assert Servers(url=url + tail).sides() == [(url, "toy-model")]


def test_without_lm_eval_the_way_to_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        FourfoldError, match=r"^--tasks needs lm-eval, .* Try: pip install 'fourfold\[tasks\] @ file://.*'"
    ):
        Servers(url="http://127.0.0.1:1", tasks=("gsm8k",)).sides()


def test_a_server_that_does_not_answer_is_named(installed: None) -> None:
    with pytest.raises(FourfoldError, match=r"http://127\.0\.0\.1:1: got no list of models at .*Connection refused"):
        Servers(url="http://127.0.0.1:1", tasks=("gsm8k",)).sides()
    with pytest.raises(FourfoldError, match="expected the address of a server"):
        Servers(url="file:///etc").sides()


@pytest.mark.parametrize("models", [{}, {"data": []}, [], "no"])
def test_a_server_of_another_kind_is_named(
    url: str, installed: None, models: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Answers, "models", models)
    with pytest.raises(FourfoldError, match="expected a running server"):
        Servers(url=url).sides()


def test_command_line(tmp_path: Path) -> None:
    asked = Tasks(names=("gsm8k",))
    found = tasks.command(asked, "gsm8k", "http://host:8000", "m", tmp_path, tmp_path / "results")
    assert found[0] == sys.executable and found[2:5] == ["run", "--model", "fourfold-completions"]
    assert "base_url=http://host:8000/v1/completions" in found and "model=m" in found
    assert f"tokenizer={tmp_path}" in found
    assert found[-5:] == ["--tasks", "gsm8k", "--log_samples", "--output_path", str(tmp_path / "results")]
    asked = Tasks(names=("gsm8k",), chat=True, tokens=4096, limit=100)
    found = tasks.command(asked, "gsm8k", "http://host:8000", "m", tmp_path, tmp_path / "results")
    assert "base_url=http://host:8000/v1/chat/completions" in found and "--apply_chat_template" in found
    assert "max_gen_toks=4096" in found and found[found.index("--limit") + 1] == "100"


def test_results_of_lm_eval_0_4_13() -> None:
    """Keys as that version wrote them for a task with one metric."""
    found = {
        "results": {"toy": {"name": "toy", "alias": "toy", "sample_len": 2, "exact_match,none": 0.5,
                            "exact_match_stderr,none": 0.25}},
        "versions": {"toy": 3},
        "n-shot": {"toy": 0},
        "n-samples": {"toy": {"original": 2, "effective": 2}},
        "lm_eval_version": "0.4.13",
        "model_name": "toy-model",
        "model_source": "local-completions",
        "chat_template": None,
    }  # fmt: skip
    assert to_builtins(tasks.read_results(found, "http://a:1", chat=False)) == {
        "url": "http://a:1",
        "lm_eval": "0.4.13",
        "model": "toy-model",
        "api": "completions",
        "chat_template": False,
        "tasks": {
            "toy": {
                "figures": {"exact_match,none": 0.5, "exact_match_stderr,none": 0.25},
                "shots": 0,
                "samples": 2,
                "version": 3,
            }
        },
    }


BOARD = """
name: GSM8K
tasks:
  - {id: other, config: socratic, split: test}
  - {id: gsm8k, config: main, split: test, solvers: [{name: generate}]}
"""
GSM8K = {"dataset_path": "openai/gsm8k", "dataset_name": "main", "test_split": "test"}


@pytest.mark.parametrize(
    ("change", "samples", "board", "found"),
    [
        ({}, 2, BOARD, "gsm8k"),
        ({}, 1, BOARD, None),
        ({"test_split": "train"}, 2, BOARD, None),
        ({"process_docs": "def process_docs(...)"}, 2, BOARD, None),
        ({"dataset_path": "json"}, 2, BOARD, None),
        ({}, 2, "tasks: [1]", None),
        ({}, 2, "tasks: [", None),
        ({}, 2, None, None),
    ],
    ids=["whole", "part", "other split", "selection", "own file", "no board", "not YAML", "not a benchmark"],
)
def test_a_benchmark_is_known_by_its_datasets_eval_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], samples: int, board: str | None,
    found: str | None,
) -> None:  # fmt: skip
    def download(dataset: str, name: str, *, repo_type: str) -> str:
        assert (dataset, name, repo_type) == ("openai/gsm8k", "eval.yaml", "dataset")
        if board is None:
            raise LocalEntryNotFoundError("not there, or no network")
        (tmp_path / name).write_text(board, encoding="utf-8")
        return str(tmp_path / name)

    monkeypatch.setattr(tasks, "hf_hub_download", download)
    results = {
        "results": {"t": {"exact_match,none": 0.5}},
        "configs": {"t": GSM8K | change},
        "n-samples": {"t": {"original": 2, "effective": samples}},
        "lm_eval_version": "0.4.13",
        "model_name": "toy-model",
        "model_source": "local-completions",
        "chat_template": None,
    }
    result = tasks.read_results(results, "http://a:1", chat=False).tasks["t"]
    assert result.benchmark == (found and Benchmark("openai/gsm8k", found))


@pytest.mark.skipif(not INSTALLED, reason="lm-eval, of the extra tasks, is not installed")
@pytest.mark.slow
def test_the_package_itself(url: str, example_model: Path, tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"q": "1 + 1", "a": "2"}\n{"q": "2 + 2", "a": "4"}\n', encoding="utf-8")
    (tmp_path / "toy.yaml").write_text(TOY.format(questions=questions), encoding="utf-8")
    name = str(tmp_path / "toy.yaml")
    found = tasks.run_task(Tasks(names=(name,)), name, url, "toy-model", example_model)
    assert {asked["prompt"] for asked in Answers.asked} == {f"Question: {sum}\nAnswer: " for sum in ("1 + 1", "2 + 2")}
    assert (found.results.model, found.results.api, found.results.url) == ("toy-model", "completions", url)
    assert found.results.tasks["toy"].figures["exact_match,none"] == 0.5
    assert found.samples == {"toy": {"exact_match,none": {"0": 1.0, "1": 0.0}}}
    assert [(one.text, one.finish) for one in found.answers] == [("2", "stop")] * 2


@pytest.mark.skipif(not INSTALLED, reason="lm-eval, of the extra tasks, is not installed")
@pytest.mark.slow
def test_a_task_that_it_does_not_know_ends_with_its_words(url: str, example_model: Path) -> None:
    with pytest.raises(FourfoldError, match=r"lm-eval on no-such-task at http.* ended with exit code"):
        tasks.run_task(Tasks(names=()), "no-such-task", url, "toy-model", example_model)
