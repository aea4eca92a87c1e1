"""How fast `fourfold verify` reads: levels 1 and 2 over a checkpoint of a few GB, beside plain sha256 of its files.

    python benchmarks/verify_speed.py --layers 2 --json benchmarks/results/verify_speed.json

The source is random, with the layers of Qwen3.6-35B-A3B (256 experts, 2048 / 512, 2 GB with its release each) and the
example's tokenizer; its release is rounded to nearest, as calibration is of no matter here. Both lie in a temporary
folder, and after the first round in the page cache, so it is the work on the bytes that is compared, not the disk.
Rounds alternate between sha256 (one thread, blocks of 8 MB) and verify; the ratio of their best rounds is the result.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fourfold
from fourfold.core import fidelity, grid
from fourfold.datatypes import Method, ProjectionStatistics, QuantizedGroup
from fourfold.formats import named
from fourfold.formats.format import Format
from fourfold.model.family import DOWN, GATE, UP
from fourfold.model.files import copy_file, dump, write_text
from fourfold.model.headers import INDEX_NAME
from fourfold.model.shards import OutputTensor, write_shard
from fourfold.model.skeleton import Skeleton
from fourfold.model.tensors import TensorIndex, raw_bytes
from fourfold.quantize import output
from fourfold.quantize.claims import draft_prefixes
from fourfold.quantize.finish import index_json, peak_memory
from fourfold.quantize.identity import source_digest, source_parts
from fourfold.quantize.plan import LayerPlan, Plan, make_plan
from fourfold.quantize.site import grid_of
from fourfold.recipe import dump_recipe, load_recipe
from fourfold.records.log import write_log
from fourfold.release.verify.run import verify

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-qwen3.6-moe"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
SIZES = {
    "hidden_size": 2048, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "num_experts": 256,
    "num_experts_per_tok": 8, "mtp_num_hidden_layers": 0,
}  # fmt: skip
BLOCK_BYTES = 8 * 2**20


def make_source(folder: Path, layers: int) -> None:
    """A random BF16 checkpoint, written tensor by tensor."""
    folder.mkdir()
    raw = json.loads((EXAMPLE / "config.json").read_text())
    kinds = ["full_attention" if layer == layers - 1 else "linear_attention" for layer in range(layers)]
    raw["text_config"] |= SIZES | {"num_hidden_layers": layers, "layer_types": kinds}
    raw["vision_config"]["out_hidden_size"] = SIZES["hidden_size"]
    write_text(folder / "config.json", dump(raw))
    for name in TOKENIZER:
        copy_file(EXAMPLE / name, folder / name)
    generator = torch.Generator().manual_seed(0)
    model = Skeleton.of(raw, folder / "config.json").blueprint.model
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    tensors = [
        OutputTensor(name=name, dtype="BF16", shape=shape, data=random_chunks(shape, generator))
        for name, shape in shapes.items()
    ]
    write_shard(folder, "model-00001-of-00001.safetensors", tensors)
    index = TensorIndex.open_shards(folder, ["model-00001-of-00001.safetensors"])
    write_text(folder / INDEX_NAME, index_json(index))


def random_chunks(shape: tuple[int, ...], generator: torch.Generator) -> Callable[[], Iterator[memoryview]]:
    def chunks() -> Iterator[memoryview]:
        left = math.prod(shape)
        while left:
            count = min(left, 2**20)
            yield raw_bytes(torch.randn(count, generator=generator).mul_(0.02).bfloat16())
            left -= count

    return chunks


def make_release(source: Path, out: Path, preset: str) -> None:
    """What quantize would leave, the experts rounded to nearest."""
    out.mkdir()
    plan = make_plan(source, load_recipe(preset), memory_bytes=2**33)
    recipe = plan.recipe
    rows: list[ProjectionStatistics] = []
    shards = {}
    for layer in plan.layers:
        written, own = write_layer(plan, layer, out)
        shards[layer.shard] = {"bytes": written.size_bytes, "sha256": written.sha256}
        rows += own
    for rest in plan.rest:
        record = output.write_rest(plan, out, rest)
        shards[rest.shard] = {"bytes": record.size_bytes, "sha256": record.sha256}
    for name in TOKENIZER:
        copy_file(source / name, out / name)
    drafts = draft_prefixes(plan.source, plan.source.headers)
    settings = {"quantization_config": named(recipe.format).quantization_config(recipe.scheme.group, drafts)}
    write_text(out / "config.json", dump({**plan.source.raw, **settings}))
    write_text(out / "recipe.toml", dump_recipe(recipe))
    write_log(out / "quant_log.csv", rows)
    write_text(out / INDEX_NAME, index_json(TensorIndex.open_shards(out, shards)))
    identity = {"recipe": recipe.digest(), "source": source_digest(plan.source), "calibration": "", "heldout": "",
                "layers": f"0-{len(plan.layers) - 1}"}  # fmt: skip
    state = {
        "fourfold": fourfold.__version__,
        "partial": False,
        "identity": identity | {"parts": {"recipe": recipe.values(), "source": source_parts(plan.source)}},
        "recipe": recipe.name,
        "format": recipe.format,
        "source": {"headers": plan.source.digest, "content": ""},
        "source_tensor_bytes": sum(header.size_bytes for header in plan.source.headers.values()),
        "output": {"content": "", "shards": shards, "tensor_bytes": plan.disk.tensor_bytes},
        "calibration": {"rows": 0, "length": 0, "sources": [], "notes": []},
        "projections": len(rows),
        "workers": [],
        "finished_at": "",
    } | {key: {} for key in ("metrics", "devices", "versions", "methods", "seconds", "peak_memory_bytes")}
    write_text(out / "fourfold.json", dump(state))


def write_layer(plan: Plan, layer: LayerPlan, out: Path) -> tuple[Any, list[ProjectionStatistics]]:
    names = [claim.header.name for claim in layer.claims if ".experts." not in claim.header.name]
    read = plan.source.read_layer(layer.index, names)
    stems, scheme, form = plan.source.stems(layer.index), plan.recipe.scheme, named(plan.recipe.format)
    tensors = dict(read.kept)
    assert read.gate_up_ENK is not None and read.down_ENK is not None
    rows = []
    for expert in range(plan.source.experts):
        gate_NK, up_NK = read.gate_up_ENK[expert].chunk(2)
        for projection, weight_NK in ((GATE, gate_NK), (UP, up_NK), (DOWN, read.down_ENK[expert])):
            stored, error = round_projection(weight_NK, grid_of(scheme), form)
            tensors |= {stems[expert][projection] + suffix: value for suffix, value in stored.items()}
            rows.append(statistics(layer.index, expert, projection, error))
    return output.write_tensors(out, layer.shard, tensors), rows


def round_projection(weight_NK: Tensor, onto: grid.Grid, format: Format) -> tuple[dict[str, Tensor], float]:
    weight_1NK = weight_NK.float()[None]
    scale_1NG = grid.absmax_scales(weight_1NK, onto)
    group = QuantizedGroup(grid.round_to_nearest(weight_1NK, scale_1NG, onto), scale_1NG)
    stored = {suffix: value[0] for suffix, value in format.pack(group).items()}
    error, _, norm = fidelity.squared_errors(
        weight_NK, format.oriented(stored[format.codes]), format.oriented(stored[format.scales])
    )
    return stored, (error / norm) ** 0.5


def statistics(layer: int, expert: int, projection: str, error: float) -> ProjectionStatistics:
    """A row of the log of which verify reads the weight error alone."""
    filled: dict[str, Any] = {field.name: 0 for field in dataclasses.fields(ProjectionStatistics)}
    known = {"layer": layer, "expert": expert, "projection": projection, "weight_error": error, "method": Method.RTN}
    return ProjectionStatistics(**filled | known)


def make_both(source: Path, out: Path, layers: int, preset: str = "card") -> None:
    make_source(source, layers)
    make_release(source, out, preset)


def plain_sha256(files: Iterable[Path]) -> tuple[int, float]:
    """Bytes and seconds of hashing files one after the other."""
    begin, size, buffer = time.perf_counter(), 0, bytearray(BLOCK_BYTES)
    for path in files:
        sha = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                sha.update(memoryview(buffer)[:count])
                size += count
    return size, time.perf_counter() - begin


def verified(out: Path, source: Path | None) -> tuple[int, float]:
    """Bytes and seconds of verify, which must pass."""
    begin = time.perf_counter()
    verdict = verify(out, model=source)
    assert verdict.passed, [check for check in verdict.checks if check.status == "fail"]
    return verdict.bytes_read, time.perf_counter() - begin


def measure(out: Path, source: Path, rounds: int) -> dict[str, Any]:
    release_files = sorted(out.glob("*.safetensors"))
    both = [*release_files, *sorted(source.glob("*.safetensors"))]
    ways: dict[str, Callable[[], tuple[int, float]]] = {
        "sha256 of the release": lambda: plain_sha256(release_files),
        "verify OUT": lambda: verified(out, None),
        "sha256 of both": lambda: plain_sha256(both),
        "verify OUT --source MODEL": lambda: verified(out, source),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    sizes = {}
    for _ in range(rounds):
        for name, way in ways.items():
            sizes[name], seconds = way()
            speeds[name].append(sizes[name] / seconds / 1e9)
    best = {name: max(each) for name, each in speeds.items()}
    return {
        "bytes": sizes,
        "gigabytes_per_second": {name: [round(speed, 3) for speed in each] for name, each in speeds.items()},
        "ratio_files": round(best["verify OUT"] / best["sha256 of the release"], 3),
        "ratio_files_and_source": round(best["verify OUT --source MODEL"] / best["sha256 of both"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to put the checkpoints (4 GB for 2 layers)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="verify-speed-", dir=options.folder))
    try:
        # In a process of its own, so that the peak of memory that is reported is verify's.
        maker = multiprocessing.get_context("spawn").Process(
            target=make_both, args=(folder / "source", folder / "release", options.layers)
        )
        maker.start()
        maker.join()
        assert maker.exitcode == 0
        result = measure(folder / "release", folder / "source", options.rounds)
    finally:
        shutil.rmtree(folder)
    result |= {
        "layers": options.layers,
        "peak_host_bytes": peak_memory()["host"],
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
