"""The commands of llama.cpp and MLX for what `convert` wrote for them: memory by the file's own sizes."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fourfold.datatypes import FourfoldError
from fourfold.formats import gguf
from fourfold.model.config import CONFIG
from fourfold.model.json_object import read_object
from fourfold.records.release import Export
from fourfold.serve.machine import Machine

LEAST_CONTEXT, STEP = 8192, 1024  # tokens
SHARE, SPARE_BYTES = 0.92, 2**30  # of free GPU memory; for what is computed
KV_BYTES = {"auto": 2.0, "fp8": 34 / 32}  # of a value: F16; llama.cpp's q8_0, in blocks of 32 with a scale
EXPERT_STACK = re.compile(r"blk\.(\d+)\.ffn_\w+_exps\.")


@dataclass(frozen=True, kw_only=True)
class LocalCommand:
    """words: the command; notes: what was predicted; problems: why it must not be run."""

    words: tuple[str, ...]
    notes: tuple[str, ...]
    problems: tuple[str, ...] = ()

    def text(self) -> str:
        return " ".join(map(shlex.quote, self.words))


@dataclass(frozen=True, kw_only=True)
class FileSizes:
    """weight_bytes: of all tensors; expert_bytes: by block; kv_values: of a token in all layers with full attention."""

    weight_bytes: int
    expert_bytes: Mapping[int, int]
    kv_values: int
    longest: int


def read_sizes(paths: Sequence[Path]) -> FileSizes:
    """Of a GGUF file or its shards, from its header."""
    readers = gguf.read_files(paths)
    fields = {key: field for key, field in readers[0].fields.items() if not key.startswith("tokenizer.")}
    name = fields["general.architecture"].contents()

    def number(key: str) -> int:
        return int(fields[f"{name}.{key}"].contents())

    blocks = number("block_count")
    recurrent = fields.get(f"{name}.attention.recurrent_layers")
    full = blocks - (sum(recurrent.contents()) if recurrent else 0)
    experts = Counter[int]()
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    for tensor in tensors:
        if match := EXPERT_STACK.match(tensor.name):
            experts[int(match[1])] += int(tensor.n_bytes)
    weight_bytes = sum(int(tensor.n_bytes) for tensor in tensors)
    values = number("attention.head_count_kv") * (number("attention.key_length") + number("attention.value_length"))
    longest = number("context_length")
    return FileSizes(weight_bytes=weight_bytes, expert_bytes=experts, kv_values=full * values, longest=longest)


def place(sizes: FileSizes, room_bytes: int, context: int | None, kv_bytes: float) -> tuple[int, int]:
    """Return a context, and how many blocks' experts must stay on the host for it.

    room_bytes: for weights and KV cache. Raises ValueError if they do not fit even with all experts on the host.
    """
    token_bytes = sizes.kv_values * kv_bytes
    least = min(context or LEAST_CONTEXT, sizes.longest)
    moved, on_host = 0, 0
    blocks = sorted(sizes.expert_bytes)
    while sizes.weight_bytes - moved + least * token_bytes > room_bytes:
        if on_host == len(blocks):
            raise ValueError
        moved += sizes.expert_bytes[blocks[on_host]]
        on_host += 1
    if context is not None:
        return least, on_host
    fits = int((room_bytes - sizes.weight_bytes + moved) / token_bytes) if token_bytes else sizes.longest
    return min(max(fits // STEP * STEP, least), sizes.longest), on_host


def llama_server(  # noqa: PLR0913  what the command line has
    folder: Path, record: Export, machine: Machine, *, mtp: int | None, draft: str | None = None,
    context: int | None, kv_cache: str | None, host: str, port: int | None, extra: Sequence[str],
) -> LocalCommand:  # fmt: skip
    """record: conversion.json."""
    files = gguf_files(folder, record)
    sizes, kv = read_sizes(files), kv_cache or "auto"
    words = [*_llama_words(files[0]), "--host", host, "--port", str(port or 8080)]
    gpus = sum(gpu.free_bytes for gpu in machine.gpus)
    room = int(gpus * SHARE) - SPARE_BYTES * len(machine.gpus) if gpus else machine.host_bytes - 2 * SPARE_BYTES
    if draft is not None:
        room -= drafter_bytes(Path(draft))
    where = "GPU memory" if gpus else "memory"
    needed = f"{sizes.weight_bytes - sum(sizes.expert_bytes.values()):,} bytes beside the experts"
    try:
        tokens, on_host = place(sizes, room, context, KV_BYTES[kv])
        if on_host and not gpus:
            needed = f"{sizes.weight_bytes:,} bytes of weights"
            raise ValueError
    except ValueError:
        problem = f"{needed} and the KV cache do not fit {room:,} bytes of {where}"
        return LocalCommand(words=tuple(words), notes=(), problems=(problem,))
    words += ["--ctx-size", str(tokens)]
    if gpus:
        words += ["--n-gpu-layers", "999", *(["--n-cpu-moe", str(on_host)] if on_host else [])]
    if kv == "fp8":
        words += ["--cache-type-k", "q8_0", "--cache-type-v", "q8_0"]
    if draft is None:
        words += _draft_words(record, mtp)
    else:
        words += ["--model-draft", draft, *(["--spec-draft-n-max", str(mtp)] if mtp else [])]
    cache = int(tokens * sizes.kv_values * KV_BYTES[kv])
    note = f"predicted: {sizes.weight_bytes:,} bytes of weights, {cache:,} of KV cache; {room:,} of {where} to use"
    return LocalCommand(words=(*words, *extra), notes=(note,))


def mlx_server(folder: Path, *, host: str, port: int | None, extra: Sequence[str]) -> LocalCommand:
    """mlx-vlm's for a model with a vision tower, which it keeps, else mlx-lm's."""
    vision = has_vision(folder)
    words = (*_mlx_words(folder, vision), "--host", host, "--port", str(port or 8080), *extra)
    notes = ("mlx_lm.server serves it too, without images and drafts",) if vision else ()
    return LocalCommand(words=words, notes=notes)


def card_command(folder: Path, record: Export, shown: Path) -> str:
    """For readers elsewhere, who have the folder as `shown`: nothing that depends on a machine."""
    if record.after == gguf.NAME:
        return shlex.join([*_llama_words(gguf_files(shown, record)[0]), *_draft_words(record, None)])
    return shlex.join(_mlx_words(shown, has_vision(folder)))


def gguf_files(folder: Path, record: Export) -> list[Path]:
    """The file or its shards. record: conversion.json. Raises FourfoldError if it names none."""
    files = [folder / name for name in sorted(record.files) if name.endswith(".gguf")]
    if not files:
        raise FourfoldError(f"{folder / 'conversion.json'}: names no .gguf file; convert the release again")
    return files


def has_vision(folder: Path) -> bool:
    """Whether a folder for MLX has a vision tower."""
    return "vision_config" in read_object(folder / CONFIG)


def drafter_bytes(file: Path) -> int:
    """Raises FourfoldError for anything but a GGUF file."""
    if file.suffix != ".gguf" or not file.is_file():
        raise FourfoldError(f"--draft: got {file}, expected a GGUF file of a drafter for llama.cpp")
    return file.stat().st_size


def _llama_words(file: Path) -> list[str]:
    return ["llama-server", "--model", str(file), "--jinja"]


def _draft_words(record: Export, mtp: int | None) -> list[str]:
    count = (2 if mtp is None else mtp) if record.has_drafts else 0
    return ["--spec-type", "draft-mtp", "--spec-draft-n-max", str(count)] if count else []


def _mlx_words(folder: Path, vision: bool) -> list[str]:
    return ["mlx_vlm.server" if vision else "mlx_lm.server", "--model", str(folder)]


def refuse_options(engine: str, options: Mapping[str, object]) -> None:
    """Raise FourfoldError for the first option that is set and that these engines do not have."""
    for name, value in options.items():
        if value:
            raise FourfoldError(f"{name}: got {value}, expected no such option with --engine {engine}")
