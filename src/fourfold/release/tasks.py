"""Benchmarks by lm-eval, against a server that runs the release and speaks OpenAI's protocol."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from huggingface_hub import hf_hub_download

from fourfold.datatypes import FourfoldError
from fourfold.install import pip_install
from fourfold.records.results import Benchmark, TaskResult, TaskResults
from fourfold.serve import client

CONCURRENT = 8  # requests at one time
LINES_SHOWN = 12
LEADERBOARD = "eval.yaml"  # of a dataset that is a benchmark: https://huggingface.co/docs/hub/eval-results


class LeaderboardTask(msgspec.Struct):
    id: str
    config: str = "default"
    split: str = "test"


class Leaderboard(msgspec.Struct):
    tasks: list[LeaderboardTask]


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """names: of lm-eval's tasks, or paths of their YAML files; url: of the server, with or without /v1."""

    names: tuple[str, ...]
    url: str


def check_tasks(tasks: Tasks) -> str:
    """Return the name of the server's first model. Raises FourfoldError without lm-eval, and if no server answers."""
    if importlib.util.find_spec("lm_eval") is None:
        raise FourfoldError(f"--tasks needs lm-eval, which is not installed. Try: {pip_install('tasks')}")
    return client.model_name(client.root(tasks.url))


def command(tasks: Tasks, model: str, tokenizer: Path, results: Path) -> list[str]:
    """lm-eval's command line: text completions without a chat template, tokenized as by the release."""
    model_args = {
        "base_url": f"{client.root(tasks.url)}/v1/completions",
        "model": model,
        "tokenizer": tokenizer.resolve(),
        "tokenizer_backend": "huggingface",
        "tokenized_requests": False,
        "num_concurrent": CONCURRENT,
    }
    return [
        *(sys.executable, "-m", "lm_eval", "run", "--model", "local-completions"),
        *("--model_args", *(f"{name}={value}" for name, value in model_args.items())),
        *("--tasks", ",".join(tasks.names), "--output_path", str(results)),
    ]


def run_tasks(tasks: Tasks, tokenizer: Path) -> TaskResults:
    """Run them; what metrics.json says of it. Raises FourfoldError with lm-eval's last lines if it fails."""
    model = check_tasks(tasks)
    with tempfile.TemporaryDirectory(prefix="fourfold-tasks-") as folder:
        results, log = Path(folder) / "results", Path(folder) / "log"
        with log.open("wb") as file:
            words = command(tasks, model, tokenizer, results)
            done = subprocess.run(words, stdout=file, stderr=subprocess.STDOUT, check=False)
        found = sorted(results.rglob("results_*.json"))
        if done.returncode or not found:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LINES_SHOWN:]
            failure = f"lm-eval on {', '.join(tasks.names)} ended with exit code {done.returncode}, its last lines:"
            raise FourfoldError("\n".join([failure, *lines]))
        return read_results(json.loads(found[-1].read_text(encoding="utf-8")), tasks.url)


def read_results(found: dict[str, Any], url: str) -> TaskResults:
    """Of lm-eval's results file: each task's figures by "metric,filter", its shots, its samples and its version."""
    rows = {}
    for task, figures in found["results"].items():
        samples = found.get("n-samples", {}).get(task, {})
        rows[task] = TaskResult(
            figures={name: value for name, value in figures.items() if "," in name},
            shots=found.get("n-shot", {}).get(task),
            samples=samples.get("effective"),
            version=found.get("versions", {}).get(task),
            benchmark=_find_benchmark(found.get("configs", {}).get(task, {}), samples),
        )
    return TaskResults(
        lm_eval=found["lm_eval_version"], model=found["model_name"], api=found["model_source"],
        chat_template=found["chat_template"] is not None, tasks=rows, url=url,
    )  # fmt: skip


def _find_benchmark(config: Mapping[str, Any], samples: Mapping[str, int]) -> Benchmark | None:
    """Return the Hub's benchmark whose whole split a task of lm-eval measured, as its dataset's eval.yaml has it.

    None for any other dataset, a selection or change of its questions, and where the Hub cannot be reached.
    """
    dataset = str(config.get("dataset_path"))
    if "/" not in dataset or config.get("process_docs") or samples.get("effective") != samples.get("original"):
        return None
    try:
        path = Path(hf_hub_download(dataset, LEADERBOARD, repo_type="dataset"))
        tasks = msgspec.yaml.decode(path.read_bytes(), type=Leaderboard).tasks
    except (OSError, msgspec.DecodeError):
        return None
    measured = (config.get("dataset_name") or "default", config.get("test_split"))
    return next((Benchmark(dataset, task.id) for task in tasks if (task.config, task.split) == measured), None)
