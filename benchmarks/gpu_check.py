"""What one GPU has to show, most important first, in nine minutes: a verdict for each step in one JSON.

    python benchmarks/gpu_check.py --fetch-wheels .whl       # where there is a network: what the GPU's machine may lack
    python3 benchmarks/gpu_check.py --wheels .whl            # where the GPU is
    python benchmarks/gpu_check.py --device cpu              # the same steps at a small size, without a GPU

Each step runs in a child process with a time limit of its own. No failure ends the check. OUT/gpu_check.json is written
after every step, so a check that is cut off leaves what it saw. Exit code 1 if a step failed or timed out.
docs/gpu-checklist.md says what the figures should be.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "tiny-qwen3.6-moe"
THERE = ("torch==2.11.0", "triton==3.6.0", "transformers==5.17.0")  # what a GPU's machine has, with all they need
TESTS = ("pytest>=8.3", "hypothesis>=6.100")
PYTHON = "3.12"  # of that machine
PLATFORMS = (*(f"manylinux_2_{minor}_x86_64" for minor in range(39, 16, -1)), "manylinux2014_x86_64")
LEAST_SECONDS = 10.0  # a step that would get less is skipped
EXPERT_BYTES = 350e6  # of a GPU's memory, for each expert of a chunk (hidden 2048, width 512)
TAIL = 1500  # characters of a failed step's output
KL_MEAN, PERPLEXITY, KL_MEDIAN, CODES = 0.08, 0.004, 0.04, 0.999  # docs/gpu-checklist.md

Figures = dict[str, Any]
ENVIRONMENT = """
import json, numpy, platform, torch, transformers
import fourfold.cli, fourfold.quantize.run
found = {"python": platform.python_version(), "numpy": numpy.__version__, "torch": torch.__version__,
         "transformers": transformers.__version__}
if %r == "cuda":
    import triton
    properties = torch.cuda.get_device_properties(0)
    found |= {"triton": triton.__version__, "cuda": torch.version.cuda, "device": properties.name,
              "memory_bytes": properties.total_memory, "sum": torch.ones(8, device="cuda").sum().item()}
print(json.dumps(found))
"""


class Wrong(Exception):
    """A step ran, and its figures are not what they should be."""

    def __init__(self, problem: str, figures: Figures) -> None:
        super().__init__(problem)
        self.figures = figures


@dataclass(frozen=True)
class Step:
    """A child process. seconds: its limit; read: its figures, from what it printed; needs: a step that must be ok."""

    name: str
    seconds: float
    command: list[str]
    read: Callable[[str], Figures]
    needs: str = ""


def run(step: Step, seconds: float, log: Path, environment: dict[str, str]) -> Figures:
    """Run a step for so long at most. Returns its line of the report."""
    start = time.monotonic()
    line: Figures = {"step": step.name, "verdict": "ok"}
    with log.open("w+", encoding="utf-8", errors="replace") as output:
        child = subprocess.Popen(
            step.command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, process_group=0
        )
        try:
            status: int | None = child.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)  # and what it started
                child.wait()
    line["seconds"] = round(time.monotonic() - start, 1)
    text = log.read_text(encoding="utf-8", errors="replace")
    if status is None:
        return line | {"verdict": "timed out", "error": f"after {seconds:.0f} s: {text[-TAIL:]}"}
    try:
        line["figures"] = step.read(text)
        problem = f"exit code {status}" if status else ""
    except Wrong as error:
        line["figures"], problem = error.figures, str(error)
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError, ImportError) as error:
        problem = f"exit code {status}, no figures ({error!r})"
    return line | ({"verdict": "failed", "error": f"{problem}: {text[-TAIL:]}"} if problem else {})


def check(options: argparse.Namespace) -> list[Figures]:
    """All steps in order, each as a line of the report, which is written after every one."""
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    deadline, lines, done = time.monotonic() + options.budget, list[Figures](), dict[str, Figures]()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(
        [str(ROOT / "src"), str(ROOT / "tests"), str(out / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    )}  # fmt: skip
    if options.device == "cpu":
        environment |= {"OMP_NUM_THREADS": "1"}
    for step in steps(options, done):
        if options.only and step.name not in options.only:
            continue
        left = deadline - time.monotonic()
        if step.needs and done.get(step.needs, {}).get("verdict") != "ok":
            line: Figures = {"step": step.name, "verdict": "skipped", "error": f"{step.needs} is not ok"}
        elif left < LEAST_SECONDS:
            line = {"step": step.name, "verdict": "skipped", "error": f"{left:.0f} s are left"}
        else:
            log = out / f"{len(lines):02d}-{re.sub('[^a-z0-9]+', '-', step.name.lower())}.log"
            limit = step.seconds if options.device == "cuda" else 4 * step.seconds
            line = run(step, min(limit, left), log, environment)
        lines.append(line)
        done[step.name] = line
        report = {"device": options.device, "date": time.strftime("%Y-%m-%d %H:%M:%S"), "steps": lines}
        (out / "gpu_check.json.part").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        os.replace(out / "gpu_check.json.part", out / "gpu_check.json")
        print(f"{line['verdict']:>9} {line.get('seconds', 0.0):6.1f} s  {step.name}", flush=True)
    return lines


# --- the steps, most important first -----------------------------------------------------------------------------


def steps(options: argparse.Namespace, done: dict[str, Figures]) -> Iterator[Step]:
    """done: lines of earlier steps by name."""
    device, out = options.device, options.out
    gpu = device == "cuda"
    loose = 1 if gpu else 4  # few predictions are measured at the small size
    if options.wheels and (missing := missing_wheels(options.wheels)):
        pip = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade", "--target", str(out / "site")]
        yield Step("wheels", 60, python(*pip, *map(str, missing)), lambda text: {"wheels": [p.name for p in missing]})
    yield Step("environment", 60, python("-c", ENVIRONMENT % device), last_line)
    chosen = ["-m", "gpu" if gpu else "not gpu and not slow", "-p", "no:cacheprovider", "-v", "--tb=short"]
    kernels = [*chosen, "tests/core/test_cuda.py", "tests/core/test_cuda_rows.py"]
    yield Step("kernels", 150, python("-m", "pytest", *kernels), tests)
    first, second = out / device, out / "cpu-again"
    yield Step("example", 90, example(first, device, gpu), lambda text: release(first))
    yield Step("example on the CPU", 90, example(second, "cpu", gpu), lambda text: alike(
        first, second, kl_mean=KL_MEAN * loose, perplexity_release=PERPLEXITY * loose), needs="example")  # fmt: skip
    yield from layers(options, done)
    two = out / "two"
    yield Step("two workers", 60, example(two, "cuda:0*2" if gpu else "cpu*2", gpu), lambda text: alike(
        first, two, codes=CODES, kl_median=KL_MEDIAN * loose), needs="example")  # fmt: skip
    slowest = max(LAYERS, key=lambda name: done.get(name, {}).get("figures", {}).get("seconds", 0.0))
    report = out / "profile.txt"
    yield Step(f"profile of {slowest}", 75, layer(options, done, "profile", *LAYERS[slowest], "--profile", str(report)),
               lambda text: {"table": report.read_text(encoding="utf-8").splitlines()})  # fmt: skip
    again = out / "again"
    yield Step("example again", 60, example(again, device, gpu), lambda text: equal(first, again),
               needs="example")  # fmt: skip
    guided = out / "guided", out / "guided-again"
    yield Step("guided example", 90, example(guided[0], device, gpu, "guided"), lambda text: release(guided[0]))
    yield Step("guided example again", 90, example(guided[1], device, gpu, "guided"), lambda text: equal(*guided),
               needs="guided example")  # fmt: skip
    compact = out / "compact"
    yield Step("compact example", 90, example(compact, device, gpu, "compact"), lambda text: release(compact))
    if gpu:
        yield Step("links", 60, python("-m", "pytest", *chosen, "tests/quantize/test_transfer.py"), tests)


LAYERS = {
    "layer fast": ["--recipe", "fast"],
    "layer best": ["--recipe", "best"],
    "layer guided": ["--recipe", "guided"],
    "layer fast, guided": ["--recipe", "fast", "--set", "guidance.tokens=65536"],
}


def layers(options: argparse.Namespace, done: dict[str, Figures]) -> Iterator[Step]:
    """GEMM rates, then a layer at full shape; a small one first, so that kernels are compiled by then."""
    rates = ["benchmarks/gemm_rate.py", "--device", options.device, "--json", str(options.out / "rates.json")]
    yield Step("GEMM rates", 60, python(*rates), lambda text: rate_figures(options.out / "rates.json"))
    if options.device == "cuda":
        small = layer(options, done, "small layer", *LAYERS["layer guided"], "--experts", "8", "--tokens", "4096")
        yield Step("small layer", 90, small, lambda text: layer_figures(options.out / "small layer.json"))
    for name, words in LAYERS.items():
        yield Step(name, 75, layer(options, done, name, *words),
                   lambda text, name=name: layer_figures(options.out / f"{name}.json"))  # type: ignore[misc] # fmt: skip


def python(*words: str) -> list[str]:
    return [sys.executable, *words]


def example(out: Path, devices: str, whole: bool, recipe: str = "best") -> list[str]:
    """Quantize the example model. whole: with all calibration and held-out text."""
    small = ["calibration.length=256", 'calibration.sources=[{builtin = "general", rows = 16}]', "heldout.windows=2",
             "heldout.length=512", "solver.pool_rows=64"]  # fmt: skip
    sizes = [] if whole else [f"--set={key}" for key in small]
    if recipe == "guided":
        sizes += [f"--set=guidance.tokens={16_384 if whole else 1_024}"]
    words = ["-m", "fourfold", "quantize", str(EXAMPLE), str(out), "--restart", "--quiet"]
    return python(*words, "--devices", devices, "--recipe", recipe, *sizes)


def layer(options: argparse.Namespace, done: dict[str, Figures], name: str, *words: str) -> list[str]:
    """benchmarks/full_layer.py at full shape, or small on a CPU. Of an option given twice the later value counts."""
    rates, memory_bytes = options.out / "rates.json", done.get("environment", {}).get("figures", {}).get("memory_bytes")
    shape = {"experts": 4, "topk": 2, "hidden": 256, "width": 128, "tokens": 2048, "chunk": 4}
    if options.device == "cuda":
        chunk = min(256, 2 ** int((memory_bytes or 24e9) / EXPERT_BYTES).bit_length() // 2)
        shape = {"experts": 256, "tokens": options.tokens, "chunk": chunk}
    sizes = [word for key, value in shape.items() for word in (f"--{key}", str(value))]
    measured = ["--rates", str(rates)] if done.get("GEMM rates", {}).get("verdict") == "ok" else []
    target = ["--json", str(options.out / f"{name}.json"), "--device", options.device]
    return python("benchmarks/full_layer.py", *sizes, *measured, *target, *words)


# --- what they found ---------------------------------------------------------------------------------------------


def last_line(text: str) -> Figures:
    found: Figures = json.loads(text.strip().splitlines()[-1])
    return found


def tests(text: str) -> Figures:
    """Of pytest: how many passed and failed, and which failed. Wrong if none passed."""
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|error|skipped)", text[-300:])}
    figures = counts | {"failures": re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE)}
    if not counts.get("passed"):
        raise Wrong("no test passed", figures)
    return figures


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def release(out: Path) -> Figures:
    """A run's metrics, seconds by stage and memory."""
    state = read(out / "fourfold.json")
    names = ("metrics", "seconds", "layer_seconds", "peak_memory_bytes", "planned_memory_bytes", "workers")
    return {name: state[name] for name in names}


def equal(first: Path, second: Path) -> Figures:
    """Wrong unless two runs gave the same bytes."""
    contents = [read(out / "fourfold.json")["output"]["shards"] for out in (first, second)]
    different = [shard for shard in contents[0] if contents[0][shard] != contents[1].get(shard)]
    if different:
        raise Wrong("not the same bytes", {"different": different, "codes of layer 0": equal_codes(first, second)})
    return {"shards": len(contents[0]), "seconds": sum(read(second / "fourfold.json")["seconds"].values())}


def alike(first: Path, second: Path, codes: float = 0.0, **limits: float) -> Figures:
    """Wrong unless metrics are as close as `limits` says, and layer 0's codes equal to so large a share."""
    one, two = (read(out / "fourfold.json")["metrics"] for out in (first, second))
    off = {name: abs(two[name] / one[name] - 1) for name in limits}
    share = equal_codes(first, second)
    figures = release(second) | {"off": off, "codes of layer 0": share}
    problems = [f"{name}: {off[name]:.2%} off, at most {limits[name]:.2%} expected" for name in off
                if off[name] > limits[name]]  # fmt: skip
    if share < codes:
        problems.append(f"{share:.4%} of layer 0's codes are equal, {codes:.2%} expected")
    if problems:
        raise Wrong("; ".join(problems), figures)
    return figures


def equal_codes(first: Path, second: Path) -> float:
    """The share of layer 0's int4 codes that two releases have in common."""
    import numpy as np  # noqa: PLC0415 (not needed to report that nothing can be imported)
    from safetensors import safe_open  # noqa: PLC0415

    one, two = (safe_open(next(out.glob("model-00001-*")), "np") for out in (first, second))
    names = [name for name in one.keys() if name.endswith("weight_packed")]
    differ = [(one.get_tensor(name) ^ two.get_tensor(name)).view(np.uint8) for name in names]
    equal = sum(int(((bytes_ & 15) == 0).sum() + ((bytes_ >> 4) == 0).sum()) for bytes_ in differ)
    return equal / sum(2 * bytes_.size for bytes_ in differ)


def rate_figures(path: Path) -> Figures:
    """TFLOP/s of each GEMM and of Cholesky, GB/s of a copy, and whether products of BF16 values are exact."""
    found = read(path)
    gemm = {kind: {"tflop_per_second": row["gflop_per_second"] / 1e3, "exact": row["exact"]}
            for kind, row in found["gemm"].items()}  # fmt: skip
    cholesky = found["cholesky"]["gflop_per_second"] / 1e3
    return {"gemm": gemm, "cholesky_tflop_per_second": cholesky, "copy_gb_per_second": found["memory"]["gb_per_second"]}


def layer_figures(path: Path) -> Figures:
    """Seconds of a layer and of each step with its share of the GEMM rate; Wrong if its error is not a number."""
    found = read(path)
    names = ("options", "seconds", "floor_seconds", "peak_bytes", "median_relative_error")
    rows = {name: [round(row["seconds"], 4), round(row["of_gemm"], 3)] for name, row in found["steps"].items()}
    figures = {name: found[name] for name in names} | {"steps": rows}
    if not 0 < found["median_relative_error"] < 0.1:
        raise Wrong("median relative error of the layer", figures)
    return figures


# --- wheels ------------------------------------------------------------------------------------------------------


def requirements() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [*project["dependencies"], *TESTS]


def missing_wheels(folder: Path) -> list[Path]:
    """Wheels of packages that this Python lacks, or has in a version that fourfold does not take."""
    from packaging.requirements import Requirement  # noqa: PLC0415 (transformers brings it)
    from packaging.utils import canonicalize_name, parse_wheel_filename  # noqa: PLC0415

    wanted = {canonicalize_name(item.name): item.specifier for item in map(Requirement, requirements())}
    missing = []
    for path in sorted(folder.glob("*.whl")):
        name = parse_wheel_filename(path.name)[0]
        try:
            there = metadata.version(name)
        except metadata.PackageNotFoundError:
            there = ""
        if not there or (name in wanted and not wanted[name].contains(there, prereleases=True)):
            missing.append(path.resolve())
    return missing


def fetch_wheels(folder: Path, have: set[str]) -> None:
    """Download what fourfold needs beyond THERE for the GPU's machine. have: names of what it has besides."""
    target = ["--only-binary=:all:", "--implementation", "cp", "--python-version", PYTHON]
    target += [word for platform in PLATFORMS for word in ("--platform", platform)]
    base, whole = (resolve([*THERE, *more], target) for more in ([], requirements()))
    pins = [f"{name}=={version}" for name, version in whole.items() if name not in base and name not in have]
    download = python("-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder))
    subprocess.run([*download, *target, *pins], check=True)
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.whl")}
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        print(f"{size / 2**20:8.2f} MiB  {name}")
    print(f"{sum(sizes.values()) / 2**20:8.2f} MiB in all")


def resolve(wanted: list[str], target: list[str]) -> dict[str, str]:
    """Versions by name of all that pip would install for a machine that has nothing."""
    dry = ["-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed", "--report", "-", "--target", "none"]
    done = subprocess.run(python(*dry, *target, *wanted), stdout=subprocess.PIPE, text=True, check=True)
    found = (item["metadata"] for item in json.loads(done.stdout)["install"])
    return {re.sub("[-_.]+", "-", item["name"]).lower(): item["version"] for item in found}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder for report, logs and releases")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for all steps (default: 540)")
    parser.add_argument("--tokens", type=int, default=262_144, help="of a full-shape layer, on a GPU (default: 262144)")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps alone, by name")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="install from here what is missing, into OUT/site")
    parser.add_argument("--fetch-wheels", type=Path, metavar="DIR", help="download wheels into DIR and stop")
    parser.add_argument("--have", default="", metavar="NAMES", help="packages that the GPU's machine has, not to fetch")
    options = parser.parse_args(arguments)
    options.out = options.out.resolve()
    return options


def main() -> int:
    options = parse()
    if options.fetch_wheels:
        fetch_wheels(options.fetch_wheels, set(filter(None, options.have.split(","))))
        return 0
    lines = check(options)
    print(options.out / "gpu_check.json")
    return int(any(line["verdict"] in ("failed", "timed out") for line in lines))


if __name__ == "__main__":
    sys.exit(main())
