"""Quality beside other tools: the same calibration rows, the same held-out rows, one judge.

    python benchmarks/quality.py --json benchmarks/results/quality.json
    python benchmarks/quality.py --ablation --json benchmarks/results/quality_ablation.json
    python benchmarks/quality.py --methods "best on code" "guided on code" --tokens 65536 --text chat \\
        --json benchmarks/results/quality_chat.json
    python benchmarks/quality.py --seeds 0 --methods fast best guided --tokens 262144 \\
        --json benchmarks/results/quality_256k.json
    python benchmarks/quality.py --model deep-moe --seeds 0 --methods fast best guided --tokens 262144 \\
        --json benchmarks/results/quality_deep_256k.json
    python benchmarks/quality.py --model deep-moe --tokens 16384 65536 \\
        --methods gptqmodel card fast best guided --json benchmarks/results/quality_deep.json
    python benchmarks/quality.py --model real-moe --methods fast best --tokens 16384 --windows 16
    python benchmarks/quality.py --model real-moe --windows 16 --fallback-share 0.005 --seeds 0 1 \\
        --methods rtn fast best --tokens 32768 --json benchmarks/results/quality_real_32k.json
    python benchmarks/quality.py --model real-moe --windows 16 --fallback-share 0.005 --seeds 0 1 \\
        --methods guided --tokens 32768 --json benchmarks/results/quality_real_32k_guided.json
    python benchmarks/quality.py --model real-moe --windows 16 --fallback-share 0.005 --seeds 0 \
        --methods rtn fast best guided --tokens 65536 --text wikitext-2-test .cache/real-moe/code.txt chat \
        --json benchmarks/results/quality_real_64k.json benchmarks/results/quality_real_code_64k.json \
        benchmarks/results/quality_real_chat_64k.json
    python benchmarks/quality.py --model real-moe --windows 16 --fallback-share 0.005 --methods fast \\
        --tokens 16384 32768 --json benchmarks/results/quality_real_before.json
    python benchmarks/quality.py --methods guided "guided with routing" --tokens 16384 65536 \\
        --text wikitext-2-test chat \\
        --json benchmarks/results/quality_routing.json benchmarks/results/quality_routing_chat.json
    python benchmarks/quality.py --model deep-moe --methods guided "guided with routing" --tokens 16384 \\
        --text wikitext-2-test chat \\
        --json benchmarks/results/quality_routing_deep.json benchmarks/results/quality_routing_deep_chat.json
    python benchmarks/quality.py --model real-moe --windows 16 --fallback-share 0.005 --seeds 0 \\
        --methods "guided with routing" --tokens 16384 --json benchmarks/results/quality_routing_real.json

quality_real_before.json was made at commit 6cab714, before down's target and the importance of tokens (docs/log.md).
A release is judged on every `--text`; each has its own file after `--json`.
`--model real-moe` is built when it is missing (benchmarks/real_moe); `make bench-real` runs all of its measurements.
Every run is kept in .cache/quality until the code or the model changes, so that an interrupted benchmark resumes.
Other tools work in environments of their own, which benchmarks/peers/install.sh makes when they are missing. Their
releases stay in the cache: they need not be made again when fourfold changes.
"""

from __future__ import annotations

import argparse
import ast
import csv
import hashlib
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from itertools import product, zip_longest
from pathlib import Path
from typing import Any

import peer
import torch
from heldout import Judge, bootstrap
from msgspec import to_builtins
from rich.console import Console
from rich.table import Table

from fourfold.bundled import HELDOUT_TEXTS
from fourfold.datatypes import Event
from fourfold.model.checkpoint import Checkpoint
from fourfold.quantize import calibrate
from fourfold.quantize.run import quantize
from fourfold.recipe import GROUP_SIZES, Recipe, load_recipe

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
ROW_TOKENS = 512
STORAGE = "gptq"  # of fourfold, GPTQModel and AutoRound; llm-compressor has compressed-tensors alone
FALLBACK = 0.16  # experts below this share of the mean load are rounded: GPTQModel's 0.5 % of tokens, with 8 of 256
PEER, RTN, ROUTING = "gptqmodel", "rtn", "guided with routing"
EXAMPLE, REAL = ROOT / "examples/tiny-qwen3.6-moe", ROOT / ".cache/models/real-moe"


@dataclass(frozen=True)
class Method:
    """A preset and what is changed in it, or another tool and options of its script (benchmarks/peers).

    code_alone: calibrated on nothing else.
    """

    name: str
    preset: str = ""
    overrides: tuple[str, ...] = ()
    code_alone: bool = False
    tool: str = ""
    options: tuple[str, ...] = ()


def less(ingredient: str, *overrides: str) -> Method:
    return Method(f"best - {ingredient}", "best", overrides)


METHODS = (
    Method(RTN, "card", ("solver.fallback_share=1",)),
    Method(PEER, tool=PEER),
    Method("autoround", tool="autoround"),
    Method("autoround-alg-ext", tool="autoround", options=("--alg-ext",)),
    Method("llmcompressor", tool="llmcompressor"),
    Method("llmcompressor-routed", tool="llmcompressor", options=("--routed-only",)),
    Method("card", "card"),
    Method("fast", "fast"),
    Method("best", "best"),
    Method("guided", "guided"),
    Method(ROUTING, "guided", ("guidance.routing=true",)),
    Method("guided down only", "guided", ("guidance.sites=down",)),
    Method("best on code", "best", code_alone=True),
    Method("guided on code", "guided", code_alone=True),
    less("target of down", "solver.asymmetric=false"),
    less("token importance", "solver.norm_power=0"),
    less("pool", "solver.pool=0"),
    less("effective tokens", "solver.effective_tokens=false"),
    less("trace matching", "solver.trace_matched=false"),
    less("both of these", "solver.effective_tokens=false", "solver.trace_matched=false"),
    less("router weights", "solver.router_weighted=false"),
    less("diagonal damping", "solver.damp_kind=mean"),
    less("activation order", "solver.order=natural"),
    less("searched scales", "solver.scale=absmax"),
    less("signed scales", "scheme.signed=false"),
    less("conditional weights", "solver.scale_weights=diagonal"),
    less("refinement", "solver.passes=0"),
    less("scale refits", "solver.refine_scales=false"),
)


@dataclass(frozen=True)
class Requirement:
    """An upper limit on a figure of one method over the same figure of another, at one number of tokens."""

    method: str
    other: str
    figure: str
    tokens: int
    limit: float
    least_layers: int = 1


REQUIREMENTS = (
    Requirement("best", PEER, "forced_kl_mean", 65_536, 0.65),
    Requirement("best", PEER, "kl_median", 65_536, 0.60),
    Requirement("fast", PEER, "forced_kl_mean", 65_536, 0.70),
    Requirement("best", PEER, "forced_kl_mean", 4_096, 0.75),
    Requirement("card", PEER, "forced_kl_mean", 4_096, 1.10),
    Requirement("card", PEER, "forced_kl_mean", 16_384, 1.10),
    Requirement("card", PEER, "forced_kl_mean", 65_536, 1.10),
    Requirement(PEER, "card", "forced_kl_mean", 4_096, 1.10),
    Requirement(PEER, "card", "forced_kl_mean", 16_384, 1.10),
    Requirement(PEER, "card", "forced_kl_mean", 65_536, 1.10),
    Requirement("best", "fast", "forced_kl_mean", 65_536, 0.80, least_layers=16),
    Requirement("guided", "best", "forced_kl_mean", 65_536, 0.78),
    Requirement("guided", "best", "kl_median", 65_536, 0.78),
    Requirement("guided", PEER, "forced_kl_mean", 65_536, 0.50),
    Requirement("guided down only", "best", "forced_kl_mean", 65_536, 0.85),
    Requirement("guided down only", "best", "kl_median", 65_536, 0.85),
    Requirement("guided on code", "best on code", "forced_kl_mean", 65_536, 1.0),
)


# ---- one run


class Text:
    """Held-out rows of one text and their judge, which is made when the first run is missing.

    name: a text that ships with fourfold, or a file; windows: how many of its windows are measured.
    """

    def __init__(self, model: Path, name: str, windows: int) -> None:
        self.model, self.name = model, name
        origin = "builtin" if name in HELDOUT_TEXTS else "path"
        wanted = (f"heldout.windows={windows}", f"heldout.length={ROW_TOKENS}", f"heldout.{origin}={name}")
        self.heldout = calibrate.heldout(load_recipe("best", wanted), calibrate.load_tokenizer(model))

    @cached_property
    def judge(self) -> Judge:
        return Judge(self.model, self.heldout.token_RT)


class Bench:
    """One model, its held-out texts, and the cache of runs.

    fallback_share: of all calibration tokens, the same rule for GPTQModel and `card`; None: FALLBACK of the mean load.
    """

    def __init__(self, model: Path, cache: Path, texts: Sequence[Text], fallback_share: float | None = None) -> None:
        self.model, self.cache, self.texts = model, cache, texts
        self.skeleton = Checkpoint.open_source(model)
        mean_load = self.skeleton.topk / self.skeleton.experts
        self.fallback_share = FALLBACK * mean_load if fallback_share is None else fallback_share
        widths = self.skeleton.widest.hidden, self.skeleton.widest.width
        sizes = [size for size in GROUP_SIZES if not any(width % size for width in widths)]
        self.group_size = max(sizes)
        self.tokenizer = calibrate.load_tokenizer(model)
        self.model_digest = digest(model.glob("*.safetensors"), (model / "config.json",))
        source = ROOT / "src/fourfold"
        own = [HERE / "heldout.py", source / "core/metrics.py", source / "core/pack.py"]
        self.judging = digest([*own, *sorted((source / "formats").glob("*.py"))])
        self.solving = digest(*((source / room).rglob("*.py") for room in ("core", "formats", "model", "quantize")))

    def recipe(self, method: Method, tokens: int, seed: int) -> Recipe:
        preset = method.preset or "card"
        rows = shares(tokens // ROW_TOKENS, [source.rows for source in load_recipe(preset).calibration.sources])
        overrides = [f"calibration.sources.{place}.rows={count}" for place, count in enumerate(rows)]
        if method.code_alone:
            overrides = [f'calibration.sources=[{{builtin="code", rows={tokens // ROW_TOKENS}}}]']
        overrides += [f"calibration.length={ROW_TOKENS}", f"calibration.seed={seed}", f"format={STORAGE}"]
        overrides.append(f"scheme.group_size={self.group_size}")
        overrides += ["heldout.windows=2", f"heldout.length={ROW_TOKENS}"]  # the judge has more
        if preset == "card":
            overrides.append(f"solver.fallback_share={self.fallback_share}")
        return load_recipe(preset, [*overrides, *method.overrides])

    def results(self, method: Method, tokens: int, seed: int) -> list[dict[str, Any]]:
        """The figures of one run on each text, from the cache if they are there."""
        recipe = self.recipe(method, tokens, seed)
        name = f"{self.model.name}-{method.name.replace(' ', '')}-{tokens}-{seed}"
        made_by = digest(peer.sources(method.tool)) if method.tool else self.solving
        key = digest_of(self.model_digest, recipe.digest(), made_by, *method.options)
        paths = [self.cache / f"{name}-{digest_of(key, text.heldout.digest, self.judging)}.json" for text in self.texts]
        missing = [(path, text) for path, text in zip(paths, self.texts, strict=True) if not path.is_file()]
        if missing:
            with tempfile.TemporaryDirectory(prefix="fourfold-quality-") as folder:
                release = Path(folder) / "release"
                if method.tool:
                    made, release = self._with_peer(method, recipe, self.cache / f"{name}-{key}")
                else:
                    made = self._with_fourfold(recipe, release)
                for path, text in missing:
                    write(path, json.dumps(made | text.judge.judge(release)))
        found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        return [{"method": method.name, "tokens": tokens, "seed": seed} | figures for figures in found]

    def _with_fourfold(self, recipe: Recipe, out: Path) -> dict[str, Any]:
        """seconds, cpu_seconds: from the first layer, of guidance if any, to the last; rows and measuring left out.

        worst_over_rtn: the largest output error of a projection over that of RTN, as the log has it.
        """
        begun: dict[str, tuple[float, float]] = {}

        def tell(event: Event) -> None:
            begun.setdefault(event.stage, (time.perf_counter(), time.process_time()))

        summary = quantize(self.model, out, recipe, progress=tell)
        start_at = begun.get("forward", begun["embed"])
        wall, cpu = (end - start for start, end in zip(start_at, begun["measure"], strict=True))
        rounded = summary.methods.get("rtn", 0)
        with (out / "quant_log.csv").open(encoding="utf-8", newline="") as log:
            worst = max(float(row["error_over_rtn"]) for row in csv.DictReader(log))
        return {"seconds": wall, "cpu_seconds": cpu, "projections": summary.projections, "rounded": rounded,
                "worst_over_rtn": worst}  # fmt: skip

    def _with_peer(self, method: Method, recipe: Recipe, kept: Path) -> tuple[dict[str, Any], Path]:
        """The release stays in `kept`. GPTQModel alone says which projections it has rounded."""
        made, release = kept / "made.json", kept / "release"
        if not made.is_file():
            options = ["--group-size", str(self.group_size), *method.options]
            if method.tool == PEER:
                options += ["--fallback-share", str(self.fallback_share)]
            if method.tool == "autoround":
                options += ["--seed", str(recipe.calibration.seed)]
            rows = calibrate.collect(recipe, self.tokenizer).token_RT.tolist()
            write(made, json.dumps(peer.quantize(method.tool, self.model, rows, release, options)))
        return json.loads(made.read_text(encoding="utf-8")), release


def write(path: Path, text: str) -> None:
    """All of it or nothing, whenever the benchmark is stopped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text(text, encoding="utf-8")
    path.with_suffix(".tmp").rename(path)


def digest_of(*parts: str) -> str:
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


def digest(*groups: Iterable[Path]) -> str:
    """sha256 of the files; of a module only its code counts, without comments and docstrings."""
    sha = hashlib.sha256()
    for path in sorted(path for group in groups for path in group):
        sha.update(code(path) if path.suffix == ".py" else path.read_bytes())
    return sha.hexdigest()


def code(path: Path) -> bytes:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree).encode()


def shares(total: int, weights: Sequence[int]) -> list[int]:
    """`total` rows dealt in proportion to `weights`, what rounding leaves to the largest remainders."""
    exact = [total * weight / sum(weights) for weight in weights]
    dealt = [int(value) for value in exact]
    for place in sorted(range(len(exact)), key=lambda place: dealt[place] - exact[place])[: total - sum(dealt)]:
        dealt[place] += 1
    return dealt


# ---- all runs


def mean_of_seeds(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One line of the table: figures averaged over seeds, and the interval of the mean KL over windows."""
    first = runs[0]
    numbers = [name for name, value in first.items() if isinstance(value, int | float) and name != "seed"]
    means = {name: statistics.fmean(run[name] for run in runs) for name in numbers}
    if "worst_over_rtn" in means:
        means["worst_over_rtn"] = max(run["worst_over_rtn"] for run in runs)
    windows = [statistics.fmean(parts) for parts in zip(*(run["kl_by_window"] for run in runs), strict=True)]
    seeds = [run["seed"] for run in runs]
    return {"method": first["method"], "seeds": seeds} | means | {"kl_interval": bootstrap(windows)}


def check(
    lines: dict[tuple[str, int], dict[str, Any]], layers: int, requirements: Sequence[Requirement]
) -> Iterator[dict[str, Any]]:
    """Each requirement whose figures are there, and whether it is met; besides, `best` rounds no expert."""
    for wanted in requirements:
        keys = (wanted.method, wanted.tokens), (wanted.other, wanted.tokens)
        if layers >= wanted.least_layers and all(key in lines for key in keys):
            ratio = lines[keys[0]][wanted.figure] / lines[keys[1]][wanted.figure]
            yield asdict(wanted) | {"found": ratio, "met": ratio <= wanted.limit}
    for (method, tokens), line in lines.items():
        if method == "best":
            rounded = line["rounded"]
            wanted = {"method": method, "figure": "rounded", "tokens": tokens, "limit": 0}
            yield wanted | {"found": rounded, "met": rounded == 0}


def show(lines: dict[tuple[str, int], dict[str, Any]], requirements: list[dict[str, Any]], title: str) -> None:
    console = Console(width=150)
    for tokens in sorted({tokens for _, tokens in lines}):
        table = Table(title=f"{title}, {tokens:,} calibration tokens; KLD x 10^-3 nats")
        for name in ("method", "forced KL", "of peer", "median", "of peer", "mean", "95 % interval", "p99", "top-1 %",
                     "perplexity", "rounded", "CPU s"):  # fmt: skip
            table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
        peer = lines.get((PEER, tokens))
        for (method, at), line in lines.items():
            if at == tokens:
                table.add_row(*cells(method, line, peer))
        console.print(table)
    for found in requirements:
        of = f" of {found['other']}'s" if "other" in found else ""
        verdict = "[green]met[/]" if found["met"] else "[red]NOT MET[/]"
        asked = f"{found['tokens']:,} tokens: {found['method']} {found['figure']}{of} <= {found['limit']}"
        console.print(f"{asked}: {found['found']:.3f} {verdict}", highlight=False)


def cells(method: str, line: dict[str, Any], peer: dict[str, Any] | None) -> Iterator[str]:
    def of_peer(figure: str) -> str:
        return f"{line[figure] / peer[figure]:.2f}" if peer else ""

    low, high = line["kl_interval"]
    yield method
    yield from (f"{1e3 * line['forced_kl_mean']:.3f}", of_peer("forced_kl_mean"))
    yield from (f"{1e3 * line['kl_median']:.3f}", of_peer("kl_median"))
    yield from (f"{1e3 * line['kl_mean']:.3f}", f"{1e3 * low:.2f} - {1e3 * high:.2f}", f"{1e3 * line['kl_p99']:.1f}")
    yield from (f"{100 * line['top1_agreement']:.2f}", f"{line['perplexity_release']:.3f}")
    yield f"{line['rounded']:.0f} of {line['projections']:.0f}" if "rounded" in line else ""
    yield "" if method == RTN else f"{line['cpu_seconds']:.0f}"  # made with a solve that is thrown away


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def shown(argument: str) -> str:
    """An argument for the record: of a path of this machine only the name."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def record(bench: Bench, text: Text, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What the figures are of: for the JSON file."""
    skeleton, engines = bench.skeleton, ("torch", "transformers")
    tools = {name: found for run in runs for name, found in run.get("versions", {}).items() if name not in engines}
    model = {"name": bench.model.name, "layers": skeleton.layers, "experts": skeleton.experts}
    return {
        "command": shlex.join(["python", "benchmarks/quality.py", *(shown(part) for part in sys.argv[1:])]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {name: version(name) for name in ("fourfold", "torch", "transformers")},
        "peer_versions": tools,
        "code": {"quantize": bench.solving, "judge": bench.judging},
        "model": model | {"sha256": bench.model_digest},
        "protocol": {
            "heldout": to_builtins(text.heldout.protocol),
            "heldout_digest": text.heldout.digest,
            "storage": STORAGE,
            "calibration_row_tokens": ROW_TOKENS,
            "fallback_share": bench.fallback_share,
            "group_size": bench.group_size,
        },
        "runs": [{name: value for name, value in run.items() if name != "kl_by_window"} for run in runs],
    }


def model_path(argument: str) -> Path:
    """The model's folder; `real-moe` is built when it is missing."""
    if argument != REAL.name:
        return Path(argument).resolve()
    subprocess.run([sys.executable, HERE / "real_moe/build.py"], check=True)
    return REAL


def main() -> None:
    names = [method.name for method in METHODS]
    ablation = ["best", *(name for name in names if name.startswith("best - "))]
    others = [method.name for method in METHODS if method.tool and method.tool != PEER]
    standard = [name for name in names if name not in (*ablation[1:], ROUTING, *others)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=model_path, default=EXAMPLE, help=f"a folder, or {REAL.name}: built if missing")
    parser.add_argument("--methods", nargs="+", choices=names, default=standard, metavar="NAME", help=", ".join(names))
    parser.add_argument(
        "--ablation", action="store_const", dest="methods", const=ablation, help="`best`, and without each ingredient"
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[4_096, 16_384, 65_536])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument(
        "--text",
        nargs="+",
        default=["wikitext-2-test"],
        help=f"that is held out: {', '.join(HELDOUT_TEXTS)}, or a file",
    )
    parser.add_argument("--windows", type=int, default=48, help=f"of {ROW_TOKENS} tokens of that text")
    parser.add_argument(
        "--fallback-share",
        type=float,
        metavar="SHARE",
        help=f"of all calibration tokens: GPTQModel and `card` round experts with fewer ({FALLBACK} of the mean load)",
    )
    parser.add_argument(
        "--json", nargs="+", type=Path, default=[], help="also write the figures there, one for each text"
    )
    options = parser.parse_args()
    if options.json and len(options.json) != len(options.text):
        parser.error(f"got {len(options.json)} files after --json, expected {len(options.text)}: one for each text")
    torch.set_num_threads(1)  # as GPTQModel: CPU seconds are then comparable, and cores can be shared
    texts = [Text(options.model, name, options.windows) for name in options.text]
    bench = Bench(options.model, ROOT / ".cache/quality", texts, options.fallback_share)
    methods = [method for method in METHODS if method.name in options.methods]
    runs: dict[Text, list[dict[str, Any]]] = {text: [] for text in texts}
    lines: dict[Text, dict[tuple[str, int], dict[str, Any]]] = {text: {} for text in texts}
    for tokens, method in product(options.tokens, methods):
        # Rounding looks at no token: one run stands for all.
        settings = [(4_096, options.seeds[0])] if method.name == RTN else []
        settings = settings or [(tokens, seed) for seed in options.seeds]
        started = time.perf_counter()
        by_setting = [bench.results(method, *setting) for setting in settings]
        seconds = time.perf_counter() - started
        for text, results in zip(texts, zip(*by_setting, strict=True), strict=True):
            runs[text] += [result for result in results if result not in runs[text]]
            lines[text][method.name, tokens] = line = mean_of_seeds(list(results))
            told = f"{tokens:>6} tokens  {method.name:<28} {text.name}: mean KLD {1e3 * line['kl_mean']:.3f}e-3"
            print(f"{told}  ({seconds:.0f} s)", file=sys.stderr, flush=True)
    failed = False
    for text, path in zip_longest(texts, options.json):
        # The limits are of models that were trained for minutes.
        limits = () if bench.model == REAL else REQUIREMENTS
        requirements = list(check(lines[text], bench.skeleton.layers, limits))
        failed |= not all(found["met"] for found in requirements)
        show(lines[text], requirements, f"{bench.model.name} on {Path(text.name).stem}")
        if path:
            means = [line | {"tokens": tokens} for (_, tokens), line in lines[text].items()]
            content = record(bench, text, runs[text]) | {"means": means, "requirements": requirements}
            path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
