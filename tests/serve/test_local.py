"""Commands for what `convert` wrote: memory by hand, words, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

import exports
from command_line import invoke
from fourfold.datatypes import FourfoldError
from fourfold.records.release import Export
from fourfold.release.export import export
from fourfold.serve.local import FileSizes, gguf_files, llama_server, place, read_sizes
from fourfold.serve.machine import Gpu, Machine

SIZES = FileSizes(weight_bytes=10_000, expert_bytes=dict.fromkeys(range(4), 2_000), kv_values=1, longest=32_768)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exported")
    out = exports.release(folder / "out", "qwen3_5_moe")
    for form in ("gguf", "mlx"):
        export(out, folder / form, form)
    return {"out": out, "gguf": folder / "gguf", "mlx": folder / "mlx"}


def test_context_and_experts_on_the_host() -> None:
    """8,192 tokens of one byte at least; each block's experts free 2,000 bytes."""
    assert place(SIZES, 100_000, None, 1.0) == (32_768, 0)
    assert place(SIZES, 10_000 + 9_300, None, 1.0) == (9_216, 0)
    assert place(SIZES, 10_000 + 8_192, None, 1.0) == (8_192, 0)
    assert place(SIZES, 10_000 + 8_191, None, 1.0) == (9_216, 1)
    assert place(SIZES, 2_000 + 100, 100, 1.0) == (100, 4)
    with pytest.raises(ValueError):
        place(SIZES, 2_000 + 99, 100, 1.0)


def test_llama_server(exported: dict[str, Path]) -> None:
    """One of two layers has a KV cache, beside the draft head's: 2 blocks x 2 heads x (32 + 32) values."""
    record = Export.read(exported["gguf"] / "conversion.json")
    file = exported["gguf"] / "out-Q4_0.gguf"
    sizes = read_sizes([file])
    assert (sizes.kv_values, sizes.longest, sorted(sizes.expert_bytes)) == (2 * 2 * (32 + 32), 4096, [0, 1, 2])
    assert sizes.expert_bytes[0] == 3 * 4 * 128 * 256 // 32 * 18
    gpu = Gpu(name="GPU", total_bytes=2**34, free_bytes=2**34, capability=(8, 6))
    asked = {"context": None, "kv_cache": "fp8", "host": "127.0.0.1", "port": None, "extra": ["--verbose"]}
    machine = Machine(gpus=(gpu,), host_bytes=2**34)
    command = llama_server(exported["gguf"], record, machine, mtp=None, **asked)
    assert not command.problems
    assert command.text() == (
        f"llama-server --model {file} --jinja --host 127.0.0.1 --port 8080 --ctx-size 4096 --n-gpu-layers 999 "
        "--cache-type-k q8_0 --cache-type-v q8_0 --spec-type draft-mtp --spec-draft-n-max 2 --verbose"
    )
    small = Machine(gpus=(), host_bytes=2**31)
    assert "do not fit" in llama_server(exported["gguf"], record, small, mtp=0, **asked).problems[0]


def test_on_the_command_line(exported: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: object) -> tuple[int, str]:
        done = invoke("serve", *arguments, columns=300)
        return done.exit_code, done.output

    code, said = run(exported["gguf"], "--engine", "llama.cpp", "--print", "--mtp", "0")
    assert code == 0 and "llama-server --model" in said and "--spec-type" not in said
    code, said = run(exported["mlx"], "--print", "--port", "9000")
    assert code == 0 and f"mlx_vlm.server --model {exported['mlx']} --host 127.0.0.1 --port 9000" in said
    for words, expected in (
        ((exported["gguf"], "--engine", "vllm"), "--engine: got vllm, expected llama.cpp"),
        ((exported["out"], "--engine", "mlx"), "--engine: got mlx, expected vllm or sglang"),
        ((exported["gguf"], "--tp", "2"), "--tp: got 2, expected no such option with --engine llama.cpp"),
        ((exported["mlx"], "--context", "4096"), "--context: got 4096, expected no such option with --engine mlx"),
    ):
        code, said = run(*words)
        assert code == 2 and expected in said
    monkeypatch.setenv("PATH", "")
    code, said = run(exported["gguf"])
    assert code == 2 and "llama-server: got none on PATH" in said


def test_a_record_without_a_file_is_refused(exported: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(FourfoldError, match=r"conversion.json: names no .gguf file; convert the release again"):
        gguf_files(tmp_path, Export.read(exported["mlx"] / "conversion.json"))
