"""Benchmarks by lm-eval, against a server that speaks OpenAI's protocol."""

from __future__ import annotations

import importlib.util
import json
import os
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
from fourfold.release.answers import THOUGHT_END, Answer, read_answer

SCRIPT = Path(__file__).parent / "engines" / "lm_eval_counts.py"
CONCURRENT = 8  # requests at one time
SECONDS = 3600  # of a request: a thought may be long
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
    """names: of lm-eval's tasks, or paths of their YAML files; chat: by chat requests with `tokens` for each answer,
    else text completions without a chat template; limit: questions of each task, None for all.
    """

    names: tuple[str, ...]
    chat: bool = False
    tokens: int | None = None
    limit: int | None = None


@dataclass(frozen=True, kw_only=True)
class TaskRun:
    """One task on one server. members: tasks of a group; samples: task -> "metric,filter" -> question -> score."""

    results: TaskResults
    members: frozenset[str]
    samples: Mapping[str, Mapping[str, Mapping[str, float]]]
    answers: list[Answer]


def require_lm_eval(option: str) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise FourfoldError(f"{option} needs lm-eval, which is not installed. Try: {pip_install('tasks')}")


def command(tasks: Tasks, name: str, address: str, model: str, tokenizer: Path, results: Path) -> list[str]:
    """lm-eval's command line for one task, tokenized as by the release."""
    path = "v1/chat/completions" if tasks.chat else "v1/completions"
    model_args: dict[str, object] = {
        "base_url": f"{address}/{path}", "model": model, "num_concurrent": CONCURRENT, "timeout": SECONDS,
    }  # fmt: skip
    if tasks.chat:
        model_args["think_end_token"] = THOUGHT_END
    else:
        model_args |= {
            "tokenizer": tokenizer.resolve(),
            "tokenizer_backend": "huggingface",
            "tokenized_requests": False,
        }
    return [
        *(sys.executable, str(SCRIPT), "run", "--model", "fourfold-chat" if tasks.chat else "fourfold-completions"),
        *("--model_args", *(f"{name}={value}" for name, value in model_args.items())),
        *(["--apply_chat_template"] if tasks.chat else []),
        *(["--gen_kwargs", f"max_gen_toks={tasks.tokens}"] if tasks.tokens else []),
        *(["--limit", str(tasks.limit)] if tasks.limit else []),
        *("--tasks", name, "--log_samples", "--output_path", str(results)),
    ]


def run_task(tasks: Tasks, name: str, address: str, model: str, tokenizer: Path) -> TaskRun:
    """Run one task to its end. Raises FourfoldError with lm-eval's last lines if it fails."""
    with tempfile.TemporaryDirectory(prefix="fourfold-tasks-") as folder:
        results, log, answers = (Path(folder) / part for part in ("results", "log", "answers.jsonl"))
        with log.open("wb") as file:
            words = command(tasks, name, address, model, tokenizer, results)
            environment = {**os.environ, "FOURFOLD_ANSWERS": str(answers)}
            done = subprocess.run(words, stdout=file, stderr=subprocess.STDOUT, check=False, env=environment)
        found = sorted(results.rglob("results_*.json"))
        if done.returncode or not found:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LINES_SHOWN:]
            failure = f"lm-eval on {name} at {address} ended with exit code {done.returncode}, its last lines:"
            raise FourfoldError("\n".join([failure, *lines]))
        kept = [*map(read_answer, read_lines(answers))] if answers.is_file() else []
        content = json.loads(found[-1].read_text(encoding="utf-8"))
        members = frozenset(task for group in content.get("group_subtasks", {}).values() for task in group)
        return TaskRun(
            results=read_results(content, address, chat=tasks.chat), members=members,
            samples=dict(map(read_samples, sorted(results.rglob("samples_*.jsonl")))), answers=kept,
        )  # fmt: skip


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_samples(path: Path) -> tuple[str, dict[str, dict[str, float]]]:
    """The task of a file of lm-eval's, and its scores: of those metrics that give a question one number."""
    scores: dict[str, dict[str, float]] = {}
    for sample in read_lines(path):
        for metric in sample["metrics"]:
            if isinstance(sample[metric], int | float):
                by_question = scores.setdefault(f"{metric},{sample['filter']}", {})
                by_question[str(sample["doc_id"])] = float(sample[metric])
    return path.name.removeprefix("samples_").rpartition("_")[0], scores


def read_results(found: dict[str, Any], url: str, *, chat: bool) -> TaskResults:
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
        lm_eval=found["lm_eval_version"], model=found["model_name"], api="chat completions" if chat else "completions",
        chat_template=chat, tasks=rows, url=url,
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
