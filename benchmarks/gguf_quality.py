"""Quality of GGUF files in llama.cpp: fourfold's beside ggml's own quantizers, with and without an importance matrix.

    python benchmarks/gguf_quality.py --json benchmarks/results/gguf.json

All files are alike but for their routed experts; everything else is BF16. All are compared with the source in fp32, in
llama.cpp, with free routing. The wheel has neither llama-quantize nor llama-imatrix: ggml's blocks are made by
ggml_quantize_chunk of the same build, which llama-quantize calls for each expert, and the importance matrix, the mean
square of each input of an expert, is collected in transformers, of the tokens that fourfold calibrates on. Rows of
`down` that are not divisible by 256 get the type that llama-quantize falls back to. llama.cpp is installed into
.engines/llama.cpp when it is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
import transformers
from gguf import GGMLQuantizationType
from llama_cpp import LlamaCpp
from msgspec import to_builtins
from quality import EXAMPLE, ROOT, ROW_TOKENS, Text, cpu_name, mean_of_seeds, shares, shown
from torch import Tensor, nn

from fourfold.core import metrics
from fourfold.model.checkpoint import Checkpoint
from fourfold.quantize import calibrate
from fourfold.quantize.run import quantize
from fourfold.recipe import Recipe, load_recipe
from fourfold.release.export import export

ENGINE = ROOT / ".engines/llama.cpp"
PARTS = ("gate", "up", "down")
EXPERTS = tuple(f"ffn_{part}_exps.weight" for part in PARTS)
Moments = dict[str, Tensor]  # mean squares [E, K] by the tensor's name in a file


@dataclass(frozen=True, kw_only=True)
class File:
    """A file to measure. preset: of fourfold; kinds: of ggml for gate, up and down; imatrix: whether it has one."""

    name: str
    preset: str = ""
    kinds: tuple[str, ...] = ()
    imatrix: bool = False

    @property
    def calibrated(self) -> bool:
        return bool(self.preset) or self.imatrix


FILES = (
    File(name="BF16", kinds=("BF16",) * 3),
    File(name="best", preset="best"),
    File(name="gguf", preset="gguf"),
    File(name="Q4_0", kinds=("Q4_0",) * 3),
    File(name="Q4_0 imatrix", kinds=("Q4_0",) * 3, imatrix=True),
    File(name="IQ4_NL imatrix", kinds=("IQ4_NL",) * 3, imatrix=True),
    File(name="IQ4_XS imatrix", kinds=("IQ4_XS", "IQ4_XS", "IQ4_NL"), imatrix=True),
    File(name="Q4_K imatrix", kinds=("Q4_K", "Q4_K", "Q5_0"), imatrix=True),
)


@dataclass(kw_only=True)
class Source:
    """The source's experts by their tensors' names in a file, [E, N, K] in fp32, and how to collect their moments."""

    model: nn.Module
    weights: dict[str, Tensor] = field(default_factory=dict)
    modules: dict[int, nn.Module] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path) -> Source:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        architecture = getattr(transformers, config["architectures"][0])
        source = cls(model=architecture.from_pretrained(folder, dtype=torch.float32).eval())
        experts = (module for name, module in source.model.named_modules() if name.endswith(".mlp.experts"))
        for layer, module in enumerate(experts):
            parts = (*module.gate_up_proj.detach().chunk(2, dim=1), module.down_proj.detach())
            source.weights |= {f"blk.{layer}.{name}": part for name, part in zip(EXPERTS, parts, strict=True)}
            source.modules[layer] = module
        return source

    @torch.no_grad()
    def moments(self, token_RT: Tensor) -> Moments:
        """Mean squares of each expert's inputs; 1 for an expert without tokens."""
        sums, counts = dict[str, Tensor](), dict[int, Tensor]()

        def watch(layer: int, module: Any, hidden_TD: Tensor, topk_expert_TA: Tensor) -> None:
            counts.setdefault(layer, torch.zeros(len(module.down_proj)))
            for expert, gate_up_NK in enumerate(module.gate_up_proj):
                input_TD = hidden_TD[(topk_expert_TA == expert).any(dim=1)]
                gate_TI, up_TI = (input_TD @ gate_up_NK.T).chunk(2, dim=1)
                counts[layer][expert] += len(input_TD)
                for name, value_TK in zip(EXPERTS, (input_TD, input_TD, module.act_fn(gate_TI) * up_TI), strict=True):
                    width = value_TK.shape[1]
                    sum_EK = sums.setdefault(f"blk.{layer}.{name}", torch.zeros(len(module.down_proj), width))
                    sum_EK[expert] += value_TK.square().sum(dim=0)

        hooks = [
            module.register_forward_pre_hook(lambda module, given, layer=layer: watch(layer, module, *given[:2]))
            for layer, module in self.modules.items()
        ]
        for batch_RT in token_RT.split(8):
            self.model.base_model(input_ids=batch_RT, use_cache=False)
        for hook in hooks:
            hook.remove()
        of_layer = {name: counts[int(name.split(".")[1])][:, None] for name in sums}
        return {name: torch.where(of_layer[name] > 0, sums[name] / of_layer[name], 1.0) for name in sums}


def rewrite(path: Path, new: Path, change: Callable[[Any], tuple[numpy.ndarray, GGMLQuantizationType]]) -> Path:
    """A copy of a file with the values and type of each tensor as `change` returns them."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(new, reader.fields["general.architecture"].contents())
    for key, value in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            sub = value.types[-1] if value.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, value.contents(), value.types[0], sub_type=sub)
    for tensor in reader.tensors:
        value, kind = change(tensor)
        writer.add_tensor(tensor.name, value, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return new


class Bench:
    def __init__(self, model: Path, folder: Path, windows: int, tokens: int) -> None:
        self.model, self.folder, self.tokens = model, folder, tokens
        self.llama, self.source = LlamaCpp(ENGINE), Source.open(model)
        self.text = Text(model, "wikitext-2-test", windows)
        self.tokenizer = calibrate.load_tokenizer(model)
        self.head_VV = torch.eye(Checkpoint.open_source(model).vocabulary)  # logits are compared as they are
        self.base: list[Tensor] = []

    def recipe(self, preset: str, seed: int) -> Recipe:
        rows = shares(self.tokens // ROW_TOKENS, [source.rows for source in load_recipe(preset).calibration.sources])
        overrides = [f"calibration.sources.{place}.rows={count}" for place, count in enumerate(rows)]
        overrides += [f"calibration.length={ROW_TOKENS}", f"calibration.seed={seed}"]
        return load_recipe(preset, [*overrides, "heldout.windows=2", f"heldout.length={ROW_TOKENS}"])

    def exported(self, preset: str, seed: int) -> Path:
        out = self.folder / f"{preset}-{seed}"
        quantize(self.model, out, self.recipe(preset, seed))
        (name,) = export(out, self.folder / f"{out.name}-gguf", "gguf").files
        return self.folder / f"{out.name}-gguf" / name

    def ggml(self, template: Path, file: File, moments: Moments) -> Path:
        def change(tensor: Any) -> tuple[numpy.ndarray, GGMLQuantizationType]:
            if (weight_ENK := self.source.weights.get(tensor.name)) is None:
                return numpy.array(tensor.data), tensor.tensor_type
            kind = GGMLQuantizationType[file.kinds[EXPERTS.index(tensor.name.split(".", 2)[2])]]
            rows = moments[tensor.name] if file.imatrix else [None] * len(weight_ENK)
            pairs = zip(weight_ENK, rows, strict=True)
            if kind == GGMLQuantizationType.BF16:
                return gguf.quants.quantize(weight_ENK.numpy(), kind), kind
            return numpy.stack([self.llama.quantize(weight_NK, kind, row_K) for weight_NK, row_K in pairs]), kind

        return rewrite(template, self.folder / "ggml.gguf", change)

    def prepare(self, source_file: Path) -> None:
        """Logits of the source in fp32, which all others are compared with."""

        def widen(tensor: Any) -> tuple[numpy.ndarray, GGMLQuantizationType]:
            return gguf.quants.dequantize(tensor.data, tensor.tensor_type), GGMLQuantizationType.F32

        self.base = list(self._logits(rewrite(source_file, self.folder / "fp32.gguf", widen)))

    def measure(self, path: Path) -> dict[str, Any]:
        parts = [
            metrics.token_statistics(source_TV, found_TV, self.head_VV, token_T[1:])
            for source_TV, found_TV, token_T in zip(
                self.base, self._logits(path), self.text.heldout.token_RT, strict=True
            )
        ]
        experts = [one for one in gguf.GGUFReader(path).tensors if one.name in self.source.weights]
        bits = 8 * sum(int(one.n_bytes) for one in experts) / sum(int(one.n_elements) for one in experts)
        found = {"expert_bits_per_weight": bits, "file_bytes": path.stat().st_size}
        by_window = {"kl_by_window": [part.kl_T.mean().item() for part in parts]}
        return found | metrics.summarize(metrics.join(parts)) | by_window

    def _logits(self, path: Path) -> Iterator[Tensor]:
        for logits_TV in self.llama.logits(path, self.text.heldout.token_RT, len(self.head_VV)):
            yield logits_TV[:-1]

    def runs(self, seeds: list[int]) -> Iterator[dict[str, Any]]:
        """One after the other; a file that no calibration changes is measured once."""
        template, moments = Path(), Moments()
        for seed in seeds:
            rows = calibrate.collect(self.recipe("best", seed), self.tokenizer).token_RT
            moments = self.source.moments(rows)
            made = {one.preset: self.exported(one.preset, seed) for one in FILES if one.preset}
            template = made["best"]
            if not self.base:
                self.prepare(self.ggml(template, FILES[0], moments))
            for one in FILES:
                if one.calibrated or seed == seeds[0]:
                    path = made[one.preset] if one.preset else self.ggml(template, one, moments)
                    yield {"method": one.name, "tokens": self.tokens, "seed": seed} | self.measure(path)


def record(bench: Bench, runs: list[Mapping[str, Any]], means: list[Mapping[str, Any]]) -> dict[str, Any]:
    heldout, skeleton = bench.text.heldout, Checkpoint.open_source(bench.model)
    return {
        "command": shlex.join(["python", "benchmarks/gguf_quality.py", *map(shown, sys.argv[1:])]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {name: version(name) for name in ("fourfold", "torch", "transformers", "gguf")}
        | {"xllamacpp": next(ENGINE.glob("lib/python3*/site-packages/xllamacpp-*.dist-info")).name[10:-10]},
        "model": {"name": bench.model.name, "layers": skeleton.layers, "experts": skeleton.experts},
        "protocol": {
            "heldout": to_builtins(heldout.protocol), "heldout_digest": heldout.digest,
            "calibration_row_tokens": ROW_TOKENS,
            "source": "fp32, llama.cpp", "kv_cache": "fp32", "flash_attention": False, "routing": "free",
            "kinds": {one.name: one.kinds for one in FILES if one.kinds},
        },
        "runs": [{key: value for key, value in run.items() if key != "kl_by_window"} for run in runs],
        "means": means,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=EXAMPLE)
    parser.add_argument("--tokens", type=int, default=65_536, help="of calibration")
    parser.add_argument("--windows", type=int, default=32, help=f"of {ROW_TOKENS} held-out tokens")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="of the calibration samples")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    make = [ROOT / "tests/engines/make_llama_cpp.sh", ENGINE]
    subprocess.run(make, check=True, env={**os.environ, "PYTHON": sys.executable}, stdout=subprocess.DEVNULL)
    runs = []
    with tempfile.TemporaryDirectory(prefix="fourfold-gguf-") as folder:
        bench = Bench(options.model.resolve(), Path(folder), options.windows, options.tokens)
        for run in bench.runs(options.seeds):
            runs.append(run)
            told = f"{run['method']:<16} seed {run['seed']}: {run['expert_bits_per_weight']:.3f} bits per weight"
            print(f"{told}, mean KLD {1e3 * run['kl_mean']:.3f}e-3", file=sys.stderr, flush=True)
        means = [
            mean_of_seeds([run for run in runs if run["method"] == one.name]) | {"tokens": options.tokens}
            for one in FILES
        ]
        if options.json:
            options.json.write_text(json.dumps(record(bench, runs, means), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
