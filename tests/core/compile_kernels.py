"""Compile the Triton kernels of core/kernels for a GPU that need not be there; one JSON object per kernel on stdout.

python tests/core/compile_kernels.py 90
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fourfold.core.kernels import cuda, cuda_rows

LEVELS = {"LOW": -8.0, "HIGH": 7.0}
MOMENTS = {"TILE": cuda.TILE, "STEP": cuda.PAIRS_PER_STEP, "INTERPRET": False}
LOOP = {"ROWS": cuda.ROWS_PER_PROGRAM, "BLOCK": 128, "SUB": cuda.SUB_BLOCK} | LEVELS
SCALES = {"SIGNED": True, "FP16": False, "LEAST": cuda.SMALLEST, "MOST": cuda.LARGEST, "ROWS": cuda.ROWS_PER_SEARCH,
          "SIZE": 128} | LEVELS  # fmt: skip
TILE = {"ROWS": cuda_rows.ROWS, "BLOCK": 128} | LEVELS
REFIT = {"REFIT": True, "SIGNED": True, "FP16": False, "LEAST": cuda.SMALLEST, "MOST": cuda.LARGEST}
KERNELS: list[tuple[Any, dict[str, Any], int]] = [
    (cuda._second_moments, MOMENTS, 8),
    (cuda._token_sums, {"COLUMNS": 256, "STEP": 16, "INTERPRET": False}, 4),
    (cuda._column_loop, LOOP, 8),
    (cuda._scale_search, SCALES, 4),
    (cuda_rows._solve_tile, TILE, cuda_rows.SOLVE_WARPS),
    (cuda_rows._refine_tile, TILE | REFIT, cuda_rows.REFINE_WARPS),
    (cuda._pack, {"WORDS": cuda.WORDS_PER_PROGRAM}, 4),
]
POINTERS = {"input_ptr": "*bf16", "token_ptr": "*i64", "offset_ptr": "*i32", "codes_ptr": "*i8", "words_ptr": "*i32"}


def compile_kernel(kernel: Any, constants: dict[str, Any], warps: int, capability: int) -> dict[str, Any]:
    names = kernel.arg_names
    kinds = {name: POINTERS.get(name, "*fp32" if name.endswith("_ptr") else "i32") for name in names}
    source = ASTSource(
        kernel,
        signature={name: "constexpr" if name in constants else kinds[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        # as at a launch: pointers and sizes that are multiples of 16
        attrs={(place,): [["tt.divisibility", 16]] for place, name in enumerate(names)
               if name not in constants and name not in ("steps", "count", "group", "groups")},
    )  # fmt: skip
    options = {"num_warps": warps, **cuda.FUSED}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    text = compiled.asm["ptx"]
    return {
        "name": kernel.fn.__name__,
        "registers": int(re.findall(r"REG:(\d+)", usage)[0]),
        "spilled_bytes": int(re.findall(r"STACK:(\d+)", usage)[0]) + int(re.findall(r"LOCAL:(\d+)", usage)[0]),
        "shared_bytes": compiled.metadata.shared,
        "divisions": sorted(set(re.findall(r"div\.\w+", text))),
        "products": sorted(set(re.findall(r"wgmma|mma|fma", text))),
    }


if __name__ == "__main__":
    print(json.dumps([compile_kernel(*kernel, int(sys.argv[1])) for kernel in KERNELS]))
