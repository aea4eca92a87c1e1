"""Small runs for end-to-end tests, and what is in a release: its tensors, unpacked by docs/formats.md alone.

Nothing here that reads a release imports fourfold; reading goes through safetensors' own reader.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import checkpoints
from fourfold.bundled import CALIBRATION_TEXTS, HELDOUT_TEXTS, TEXT
from fourfold.datatypes import Event
from fourfold.distributed.devices import Machine
from fourfold.quantize.run import quantize
from fourfold.quantize.summary import Summary
from fourfold.recipe import Recipe

FORMATS = ("compressed-tensors", "gptq", "gptq_v2")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
MEMORY_BYTES = 2 * 2**30  # the same batches on every machine
machine = Machine(memory_bytes=MEMORY_BYTES)  # of runs that name none; `pytest --devices "cpu*4"` sets another
DOCUMENTS = 12  # of calibration text: some 25,000 tokens
RECIPE = """
name = "small"
[calibration]
length = 128
[[calibration.sources]]
path = "prose.jsonl"
kind = "text"
fields = ["text"]
rows = 8
[heldout]
path = "heldout.txt"
windows = 2
length = 128
[solver]
pool_rows = 256
"""
# Not of the result.
RECORDED = (
    "seconds", "layer_seconds", "device_memory_bytes", "peak_memory_bytes", "planned_memory_bytes", "workers",
    "finished_at",
)  # fmt: skip

# Sidecars that the example lacks. What is in them is nobody's business: they are copied byte for byte.
SIDECARS = {
    "added_tokens.json": b'{"<a>": 2047}',
    "special_tokens_map.json": b'{\r\n "pad_token": "<|endoftext|>"}',
    "processor_config.json": b"{}",
    "preprocessor_config.json": b'{"size": {"longest_edge": 16777216}}',
    "video_preprocessor_config.json": b"{}\n",
    "LICENSE": "Apache \u2013 no newline at the end".encode(),
}


def write_recipe(folder: Path) -> Path:
    """RECIPE as a file. Its texts are the starts of the bundled ones, whose tokens alone would take half of a run."""
    documents = (TEXT / CALIBRATION_TEXTS["general"].file).read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "prose.jsonl").write_text("".join(documents[:DOCUMENTS]), encoding="utf-8")
    text = (TEXT / HELDOUT_TEXTS["wikitext-2-test"].file).read_text(encoding="utf-8")
    (folder / "heldout.txt").write_text(text[:12_000], encoding="utf-8")
    (folder / "small.toml").write_text(RECIPE, encoding="utf-8")
    return folder / "small.toml"


def make_source(folder: Path, **options: Any) -> Path:
    """checkpoints.tiny with every sidecar, and its vectors in F32, as A_log and norms are published here and there."""
    checkpoints.tiny(folder, **options)
    for name, content in SIDECARS.items():
        (folder / name).write_bytes(content)

    def widen(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: value.float() for name, value in tensors.items() if value.ndim == 1})

    checkpoints.edit(folder, widen)
    return folder


def run(model: Path, out: Path, recipe: Recipe, **options: Any) -> Summary:
    return quantize(model, out, recipe, **{"machine": machine} | options)


def stop_at(stage: str, layer: int = -1, error: BaseException | None = None) -> Callable[[Event], None]:
    """A progress callback that raises where a stage begins, as Ctrl-C would."""

    def tell(event: Event) -> None:
        if (event.kind, event.stage, event.layer, event.done) == ("stage", stage, layer, 0):
            raise KeyboardInterrupt if error is None else error

    return tell


def damage(path: Path) -> None:
    """Change 64 bytes near the end of a file."""
    content = bytearray(path.read_bytes())
    content[-96:-32] = bytes(byte ^ 255 for byte in content[-96:-32])
    path.write_bytes(content)


def tree(out: Path) -> dict[str, bytes]:
    """Every file's bytes, what is recorded of time and memory taken out."""
    found = {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    for name in (".fourfold/run.log", ".fourfold/lock"):
        found.pop(name, None)
    state = json.loads(found["fourfold.json"])
    found["fourfold.json"] = json.dumps({key: value for key, value in state.items() if key not in RECORDED}).encode()
    table = [line.rsplit(b",", 1)[0] for line in found["quant_log.csv"].splitlines()]
    assert table[0].endswith(b"scale_negative_share"), "the last column is `seconds`"
    found["quant_log.csv"] = b"\n".join(table)
    return found


# --- what is in a folder of shards ----------------------------------------------------------------


def shards(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Shard name -> its tensors by name, through safetensors' own reader."""
    found: dict[str, dict[str, Tensor]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found[path.name] = {name: file.get_tensor(name) for name in file.keys()}
    return found


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint; each is in one shard only."""
    parts = shards(folder).values()
    whole = {name: value for part in parts for name, value in part.items()}
    assert len(whole) == sum(map(len, parts))
    return whole


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def expert_names(prefix: str, layers: range, experts: int) -> Iterator[tuple[int, int, str, str]]:
    """(layer, expert, projection, `....mlp.experts.E.gate_proj.`). prefix: of the text model's tensors."""
    for layer in layers:
        for expert in range(experts):
            for projection in PROJECTIONS:
                yield layer, expert, projection, f"{prefix}layers.{layer}.mlp.experts.{expert}.{projection}."


# --- the unpacker, written from docs/formats.md ---------------------------------------------------


def unpack_words(words: Tensor, bits: int = 4) -> Tensor:
    """int32 [N, W] to codes [N, K] in int64: q + 2^(bits - 1), the lowest bits are the lowest input feature."""
    unsigned = words.to(torch.int64) % 2**32
    fields = torch.stack([unsigned >> place * bits & 2**bits - 1 for place in range(32 // bits)], dim=-1)
    return fields.reshape(len(words), -1) - 2 ** (bits - 1)


def codes_and_scales(found: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """A projection's codes [N, K] and scales [N, G] in float64, from whichever storage it is in."""
    if f"{name}weight_packed" in found:
        words, inputs = found[f"{name}weight_packed"], int(found[f"{name}weight_shape"][1])
        return unpack_words(words, 32 * words.shape[1] // inputs), found[f"{name}weight_scale"].double()
    words, inputs = found[f"{name}qweight"].T, len(found[f"{name}g_idx"])
    return unpack_words(words, 32 * words.shape[1] // inputs), found[f"{name}scales"].T.double()


def dequantize(found: dict[str, Tensor], name: str) -> Tensor:
    """A projection's weight [N, K] in float64: code times the scale of its row and group. Exact."""
    codes, scales = codes_and_scales(found, name)
    group = codes.shape[1] // scales.shape[1]
    return codes * scales[:, torch.arange(codes.shape[1]) // group]


def write_twin(out: Path, folder: Path) -> Path:
    """Write a release as a BF16 checkpoint of the weights that engines multiply by, experts in stacks."""
    shutil.copytree(out, folder, ignore=shutil.ignore_patterns("*.safetensors", "model.safetensors.index.json"))
    found = tensors(out)
    codes = ("weight_packed", "qweight")
    stems = [name[: -len(code)] for name in found for code in codes if name.endswith(f".{code}")]
    whole = {name: value for name, value in found.items() if not name.startswith(tuple(stems))}
    whole |= {f"{stem}weight": dequantize(found, stem).bfloat16() for stem in stems}
    for down in [name for name in whole if name.endswith("experts.0.down_proj.weight")]:
        prefix = down.removesuffix("0.down_proj.weight")
        count = sum(name.startswith(prefix) for name in whole) // len(PROJECTIONS)
        gate, up, last = (
            torch.stack([whole.pop(f"{prefix}{expert}.{part}.weight") for expert in range(count)])
            for part in PROJECTIONS
        )
        whole |= {f"{prefix}gate_up_proj": torch.cat([gate, up], dim=1), f"{prefix}down_proj": last}
    save_file({name: value.contiguous() for name, value in whole.items()}, folder / "model.safetensors")
    config = read_json(folder / "config.json")
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def raise_codes(words: Tensor) -> Tensor:
    """int32 words with every code one higher, 7 as it is: what reading v1's zero points as v2's comes to."""
    pairs = words.contiguous().view(torch.uint8)
    low, high = ((nibble + 1).clamp(max=15) for nibble in (pairs & 15, pairs >> 4))
    return (low | high << 4).view(torch.int32)


def source_weight(found: dict[str, Tensor], name: str) -> Tensor:
    """The same projection [N, K] of a BF16 checkpoint, in float64, from either layout."""
    if f"{name}weight" in found:
        return found[f"{name}weight"].double()
    prefix, expert, projection = name.rstrip(".").rsplit(".", 2)
    if projection == "down_proj":
        return found[f"{prefix}.down_proj"][int(expert)].double()
    gate, up = found[f"{prefix}.gate_up_proj"][int(expert)].double().chunk(2)
    return gate if projection == "gate_proj" else up
