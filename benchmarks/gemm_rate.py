"""What this machine can do at most: GEMM by number format, Cholesky, memory bandwidth. The floor of other benchmarks.

    python benchmarks/gemm_rate.py --device cpu --threads 1    # benchmarks/results/gemm_rate_cpu.json

Best of the repetitions that fit two seconds each; CPU time with one thread, wall time otherwise.
"exact": a product of BF16 values (integers, whose every partial sum fp32 holds) came out to the last bit, so neither
products nor the result are rounded to less. "inputs_rounded": an fp32 product shows that inputs lost bits; where a
setting asks for that and it says false, the setting is not taken on this machine, and products are fp32.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
SECONDS_EACH, REPETITIONS = 2.0, 3  # a rate is measured for so long, and so often at least
SIZE = {"cpu": 2048, "cuda": 8192}  # of square GEMMs
STACK = {"cpu": 4, "cuda": 32}  # matrices of 2048 x 2048 in a batched Cholesky
COPIED_BYTES = {"cpu": 2**28, "cuda": 2**32}


@contextmanager
def precision(backend: Any, value: str) -> Iterator[None]:
    """fp32_precision of a backend's matmul, for a while."""
    before = backend.fp32_precision
    backend.fp32_precision = value
    try:
        yield
    finally:
        backend.fp32_precision = before


def best_seconds(step: Callable[[], object], device: str) -> float:
    """Least time of one step, after one that warms up: wall time, or one thread's own where there is but one."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    alone = device == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter  # of a shared machine, what the core itself can do
    step()
    wait()
    seconds: list[float] = []
    while len(seconds) < REPETITIONS or sum(seconds) < SECONDS_EACH:
        start = clock()
        step()
        wait()
        seconds.append(clock() - start)
    return min(seconds)


def gemm_kinds(device: str) -> dict[str, tuple[torch.dtype, torch.dtype | None, Any]]:
    """Name -> dtype of the inputs, of the output where it is another, and the setting that it is run under."""
    if device == "cpu":
        onednn = torch.backends.mkldnn.matmul
        return {
            "fp32": (torch.float32, None, lambda: precision(onednn, "ieee")),
            "fp32, bf16 asked for": (torch.float32, None, lambda: precision(onednn, "bf16")),
            "bf16": (torch.bfloat16, None, nullcontext),
        }
    cublas = torch.backends.cuda.matmul
    return {
        "fp32": (torch.float32, None, lambda: precision(cublas, "ieee")),
        "tf32": (torch.float32, None, lambda: precision(cublas, "tf32")),
        "fp16": (torch.float16, None, nullcontext),
        "bf16": (torch.bfloat16, None, nullcontext),
        "bf16, fp32 out": (torch.bfloat16, torch.float32, nullcontext),
    }


def multiply(left: Tensor, right: Tensor, output: torch.dtype | None) -> Tensor:
    return left @ right if output is None else torch.mm(left, right, out_dtype=output)


def measure_gemms(device: str) -> dict[str, dict[str, object]]:
    size = SIZE[device]
    generator = torch.Generator().manual_seed(0)
    # up to 7 bits, so that BF16 holds them; sums stay far below 2^24
    left, right = (torch.randint(-90, 91, (size, size), generator=generator).float() for _ in range(2))
    normal = torch.randn(size, size, generator=generator)
    found: dict[str, dict[str, object]] = {}
    for kind, (dtype, output, setting) in gemm_kinds(device).items():
        a, b = left.to(device, dtype), right.to(device, dtype)
        with setting():
            exact = error_of(a, b, output) == 0
            rounded = dtype == torch.float32 and error_of(normal.to(device), normal.to(device), output) > 1e-4
            seconds = best_seconds(lambda a=a, b=b, output=output: multiply(a, b, output), device)
        found[kind] = {
            "gflop_per_second": 2 * size**3 / seconds / 1e9,
            "exact": exact,
            "inputs_rounded": rounded,
            "size": size,
        }
    return found


def error_of(left: Tensor, right: Tensor, output: torch.dtype | None) -> float:
    """Largest error of a corner of the product, as a share of its largest value."""
    product = multiply(left, right, output)[:256, :256].cpu().double()
    wanted = left[:256].cpu().double() @ right[:, :256].cpu().double()
    return ((product - wanted).abs().max() / wanted.abs().max()).item()


def measure_cholesky(device: str) -> dict[str, object]:
    """fp32, batched, as the solve does it."""
    size, count = 2048, STACK[device]
    root = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(device)
    stack = (root @ root.T + size * torch.eye(size, device=device)).expand(count, size, size).contiguous()
    seconds = best_seconds(lambda: torch.linalg.cholesky_ex(stack), device)
    return {"gflop_per_second": count * size**3 / 3 / seconds / 1e9, "size": size, "matrices": count}


def measure_memory(device: str) -> dict[str, object]:
    """A copy, read and written bytes both counted."""
    source = torch.ones(COPIED_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    seconds = best_seconds(lambda: target.copy_(source), device)
    return {"gb_per_second": 2 * len(source) / seconds / 1e9, "bytes": len(source)}


def measure_rates(device: str, threads: int) -> dict[str, Any]:
    """Rates of "cpu" with so many threads, or of "cuda": GFLOP/s of each kind of GEMM and of Cholesky, GB/s of a copy.

    {"gemm": {kind: {"gflop_per_second", "exact", "inputs_rounded", "size"}}, "cholesky": {"gflop_per_second", ...},
    "memory": {"gb_per_second", ...}}. Settings are as before afterwards.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            return {
                "gemm": measure_gemms(device),
                "cholesky": measure_cholesky(device),
                "memory": measure_memory(device),
            }
    finally:
        torch.set_num_threads(before)


def machine(device: str, threads: int) -> str:
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        name = f"{properties.name}, SM {properties.major}.{properties.minor}, {properties.multi_processor_count} SMs"
        return f"{name}, torch {torch.__version__}"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if platform.system() == "Linux" else []
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
    has_bf16 = any(line.startswith("flags") and "avx512_bf16" in line.split() for line in lines)
    features = "with" if has_bf16 else "without"
    return f"{model} {platform.machine()}, {features} AVX-512 BF16, {threads} threads, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="where the figures go (default: benchmarks/results)")
    options = parser.parse_args()
    rates = measure_rates(options.device, options.threads)
    host = machine(options.device, options.threads)
    print(host)
    for kind, values in rates["gemm"].items():
        exact = "exact for BF16 values" if values["exact"] else "not exact for BF16 values"
        inputs = ", fp32 inputs are rounded" if values["inputs_rounded"] else ""
        print(f"{'GEMM ' + kind:>28} {values['gflop_per_second']:12,.1f} GFLOP/s   {exact}{inputs}")
    print(f"{'Cholesky fp32':>28} {rates['cholesky']['gflop_per_second']:12,.1f} GFLOP/s")
    print(f"{'memory, a copy':>28} {rates['memory']['gb_per_second']:12,.1f} GB/s")
    report = {
        "machine": host,
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", "benchmarks/gemm_rate.py", *sys.argv[1:]]),
        "device": options.device,
        "threads": options.threads,
        **rates,
    }
    target = options.json or RESULTS / f"gemm_rate_{options.device}.json"
    target.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
