"""Three routes to native code for the in-block column loop on a CPU, and plain torch: milliseconds for one block.

    python benchmarks/inblock_routes.py --json benchmarks/results/inblock_routes.json

1024 rows, 128 columns, one thread. numba: core/kernels/cpu.py. torch.compile: its C++ backend on 16 columns unrolled,
a GEMM between them, as a loop of 128 unrolled takes minutes to compile. C++: torch's extension loader, the same
algorithm as numba's. The last two need a C++ compiler where fourfold runs (C++ also ninja), numba needs none.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gemm_rate import machine
from torch import Tensor
from torch.utils.cpp_extension import load_inline

from fourfold.core import grid
from fourfold.core.gptq import inblock_torch
from fourfold.core.kernels import cpu

ROWS, COLUMNS, STEP, REPETITIONS = 1024, 128, 16, 20
INT4 = grid.Grid(levels=grid.INT4, group_size=COLUMNS, scale_dtype="bf16")
SOURCE = """
#include <torch/extension.h>
#include <algorithm>
#include <cmath>
constexpr int L = 64, T = 8;
using torch::Tensor;
std::vector<Tensor> inblock(Tensor target, Tensor weight, Tensor feedback, Tensor scale) {
  const int64_t rows = target.size(0), columns = target.size(1);
  auto codes = torch::empty({rows, columns}, torch::kInt8), error = torch::empty({rows, columns});
  auto t = target.accessor<float, 2>(), w = weight.accessor<float, 2>(), s = scale.accessor<float, 2>();
  const float* f = feedback.data_ptr<float>();
  auto c = codes.accessor<int8_t, 2>();
  auto e = error.accessor<float, 2>();
  std::vector<float> ahead(columns * L), missed(columns * L), step(columns * L), code(columns * L);
  for (int64_t row = 0; row < rows; row += L) {
    for (int lane = 0; lane < L; ++lane)
      for (int64_t j = 0; j < columns; ++j) {
        ahead[j * L + lane] = t[row + lane][j];
        missed[j * L + lane] = w[row + lane][j];
        step[j * L + lane] = s[row + lane][j];
      }
    for (int64_t start = 0; start < columns; start += T) {
      for (int64_t j = start; j < start + T; ++j) {
        for (int lane = 0; lane < L; ++lane) {
          const int64_t at = j * L + lane;
          code[at] = std::nearbyint(std::min(std::max(ahead[at] / step[at], -8.0f), 7.0f));
          missed[at] -= code[at] * step[at];
        }
        for (int64_t k = j + 1; k < start + T; ++k)
          for (int lane = 0; lane < L; ++lane) ahead[k * L + lane] += missed[j * L + lane] * f[j * columns + k];
      }
      for (int64_t k = start + T; k < columns; ++k)
        for (int lane = 0; lane < L; ++lane) {
          float sum = ahead[k * L + lane];
          for (int i = 0; i < T; ++i) sum += missed[(start + i) * L + lane] * f[(start + i) * columns + k];
          ahead[k * L + lane] = sum;
        }
    }
    for (int lane = 0; lane < L; ++lane)
      for (int64_t j = 0; j < columns; ++j) {
        c[row + lane][j] = static_cast<int8_t>(code[j * L + lane]);
        e[row + lane][j] = missed[j * L + lane];
      }
  }
  return {codes, error};
}
"""


@torch.compile(dynamic=False)
def solve_step(target_BN: Tensor, weight_BN: Tensor, feedback_BB: Tensor, scale_BN: Tensor) -> tuple[Tensor, Tensor]:
    """A few columns, columns first."""
    codes, errors = [], []
    rest = list(target_BN.unbind(0))
    for j in range(STEP):
        code_N = (rest[j] / scale_BN[j]).round().clamp(-8, 7)
        errors.append(weight_BN[j] - code_N * scale_BN[j])
        codes.append(code_N)
        rest = [row_N + feedback_BB[j, k] * errors[j] if k > j else row_N for k, row_N in enumerate(rest)]
    return torch.stack(codes), torch.stack(errors)


def compiled(target_ENB: Tensor, weight_ENB: Tensor, feedback_EBB: Tensor, scale_ENB: Tensor) -> tuple[Tensor, Tensor]:
    target_BN, weight_BN, scale_BN = (values[0].T.contiguous() for values in (target_ENB, weight_ENB, scale_ENB))
    codes_BN, error_BN = torch.empty_like(target_BN, dtype=torch.int8), torch.empty_like(target_BN)
    for start in range(0, COLUMNS, STEP):
        here = slice(start, start + STEP)
        codes, error_BN[here] = solve_step(
            target_BN[here], weight_BN[here], feedback_EBB[0, here, here].contiguous(), scale_BN[here]
        )
        codes_BN[here] = codes
        target_BN[here.stop :].addmm_(feedback_EBB[0, here, here.stop :].T, error_BN[here])
    return codes_BN.T[None], error_BN.T[None]


def extension() -> Callable[..., tuple[Tensor, Tensor]]:
    module: Any = load_inline("inblock", SOURCE, functions=["inblock"], extra_cflags=["-O3", "-march=native"])

    def run(target_ENB: Tensor, weight_ENB: Tensor, feedback_EBB: Tensor, scale_ENB: Tensor) -> tuple[Tensor, Tensor]:
        codes, error = module.inblock(target_ENB[0], weight_ENB[0], feedback_EBB[0].contiguous(), scale_ENB[0])
        return codes[None], error[None]

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    weight_ENB = torch.randn(1, ROWS, 2048, generator=generator)[:, :, :COLUMNS] * 0.02
    feedback_EBB = torch.randn(1, COLUMNS, COLUMNS, generator=generator) * 0.05
    scale_ENB = (weight_ENB.abs().amax(dim=2, keepdim=True) / 7).expand_as(weight_ENB)
    given = weight_ENB.contiguous(), weight_ENB, feedback_EBB, scale_ENB
    ours = {"torch": partial(inblock_torch, grid=INT4), "numba": partial(cpu.inblock, grid=INT4)}
    routes = ours | {"torch.compile": compiled, "C++": extension()}
    wanted, _ = inblock_torch(*given, INT4)
    found = {}
    for name, route in routes.items():
        start = time.perf_counter()
        codes, _ = route(*given)
        first = time.perf_counter() - start
        seconds = []
        for _ in range(REPETITIONS):
            start = time.process_time()
            route(*given)
            seconds.append(time.process_time() - start)
        equal = (codes == wanted).float().mean().item()
        found[name] = {"milliseconds": min(seconds) * 1e3, "first_call_seconds": first, "equal_codes": equal}
        print(f"{name:>14} {min(seconds) * 1e3:8.2f} ms, first call {first:6.2f} s, {equal:.4%} of torch's codes")
    if options.json:
        figures = {"machine": machine("cpu", 1), "date": time.strftime("%Y-%m-%d"), "routes": found}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
