"""The reference machine simulated: a full-shape checkpoint on four CPU workers that may take 3 GiB each.

    python benchmarks/reference_machine.py --json benchmarks/results/reference_machine.json

Four layers of Qwen3.6-35B-A3B (three linear attention, one full; 256 experts; its vocabulary; no vision, no MTP; about
8.8 GB of random weights, made on the fly) are quantized with `--devices cpu*4 --memory cpu=3GiB,host=6GiB`: chunks of
experts, samples and buffers within their budgets. Records the time and the peak memory of the process;
predictions.py compares both with the plan.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gemm_rate import machine

from fourfold.model.shards import OutputTensor, write_shard
from fourfold.model.skeleton import Skeleton
from fourfold.model.tensors import raw_bytes
from fourfold.recipe import load_recipe

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "tiny-qwen3.6-moe"
GIB = 2**30
RESIDENT_BYTES = 18 * GIB  # required of the run
WORKERS, WORKER_GIB, HOST_GIB = 4, 3, 6


def full_shape_config(layers: int) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads((EXAMPLE / "config.json").read_text(encoding="utf-8"))
    raw["text_config"] |= {
        "hidden_size": 2048,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "num_hidden_layers": layers,
        "layer_types": ["full_attention" if layer % 4 == 3 else "linear_attention" for layer in range(layers)],
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "vocab_size": 248_320,
        "mtp_num_hidden_layers": 0,
    }
    raw["vision_config"]["out_hidden_size"] = 2048
    return raw


def make_checkpoint(folder: Path, layers: int) -> None:
    """Shards of one layer each, values made as they are written."""
    raw = full_shape_config(layers)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json"):
        shutil.copyfile(EXAMPLE / name, folder / name)
    skeleton = Skeleton.of(raw, folder / "config.json")
    shards: dict[str, list[OutputTensor]] = {}
    weight_map: dict[str, str] = {}
    # Names in memory: the Hub has the same, with experts in stacks.
    for number, (name, value) in enumerate(skeleton.blueprint.model.state_dict().items()):
        part = name.partition("layers.")[2].partition(".")[0] if ".layers." in name else "rest"
        shard = f"model-{part}.safetensors"
        shape = tuple(value.shape)
        values = partial(random_values, name, shape, number)
        shards.setdefault(shard, []).append(OutputTensor(name=name, dtype="BF16", shape=shape, data=values))
        weight_map[name] = shard
    for shard, tensors in shards.items():
        write_shard(folder, shard, tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def random_values(name: str, shape: tuple[int, ...], seed: int) -> Iterator[memoryview]:
    """Matrices of unit gain with rows of different loudness, power-law embeddings; vectors are zero."""
    generator = torch.Generator().manual_seed(seed)
    rows = math.prod(shape[:-1])
    if len(shape) == 1:
        yield raw_bytes(torch.zeros(shape, dtype=torch.bfloat16))
        return
    for first in range(0, rows, 4096):
        count = min(4096, rows - first)
        values = torch.randn(count, shape[-1], generator=generator).mul_(shape[-1] ** -0.5)
        if "embed_tokens" in name:
            values *= torch.arange(1, shape[-1] + 1) ** -0.5 * 20
        else:
            values *= torch.exp(0.3 * torch.randn(count, 1, generator=generator))
        yield raw_bytes(values.bfloat16())


def run(model: Path, out: Path, rows: int, length: int) -> dict[str, Any]:
    """The command itself, in a process of its own; what fourfold.json says of it."""
    sources = len(load_recipe("best").calibration.sources)
    counts = [rows // sources + (place < rows % sources) for place in range(sources)]
    settings = [f"calibration.sources.{place}.rows={count}" for place, count in enumerate(counts)]
    settings += [f"calibration.length={length}", "heldout.windows=1"]
    command = [sys.executable, "-m", "fourfold", "quantize", str(model), str(out)]
    command += ["--devices", f"cpu*{WORKERS}", "--memory", f"cpu={WORKER_GIB}GiB,host={HOST_GIB}GiB"]
    start = time.perf_counter()
    subprocess.run([*command, *(f"--set={setting}" for setting in settings)], check=True, stdout=sys.stderr)
    state = json.loads((out / "fourfold.json").read_text())
    return {
        "wall_seconds": time.perf_counter() - start,
        "rows": rows,
        "length": length,
        "methods": state["methods"],
        "batches": state["settings"]["batches"],
        "peak_bytes": state["peak_memory_bytes"]["host"],
        "workers": state["workers"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is made (kept) and the release lands")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        model = Path(scratch) / "model"
        make_checkpoint(model, options.layers)
        found = run(model, Path(scratch) / "out", options.rows, options.length)
    met = found["peak_bytes"] <= RESIDENT_BYTES
    print(f"peak {found['peak_bytes'] / GIB:.2f} GiB; {found['wall_seconds']:.0f} s; required met: {met}")
    if options.json:
        figures = {
            "command": f"python benchmarks/reference_machine.py --layers {options.layers} --rows {options.rows} "
            f"--length {options.length}",
            "machine": machine("cpu", 2),
            "date": time.strftime("%Y-%m-%d"),
            "run": found,
            "required_met": met,
        }
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
