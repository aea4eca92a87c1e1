"""Small checkpoints of families with a tokenizer, releases of them, and the same weights in BF16."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

import checkpoints
import families
import releases
from fourfold.quantize.run import quantize
from fourfold.recipe import Recipe, load_recipe

# What vLLM wants of Gemma 4: the tokens and the classes that stand for images and sound.
GEMMA4_TOKENS = {f"{part}_token": "<|image_pad|>" for part in ("image", "boi", "eoi", "audio", "boa", "eoa")}
GEMMA4_PROCESSOR = {
    "processor_class": "Gemma4Processor",
    "image_processor": {"image_processor_type": "Gemma4ImageProcessor"},
    "feature_extractor": {"feature_extractor_type": "Gemma4AudioFeatureExtractor"},
    "video_processor": {"video_processor_type": "Gemma4VideoProcessor"},
}
TOKENS = (2, 64)  # held-out windows, and tokens of each
SIDECARS = (*checkpoints.TOKENIZER_FILES, "preprocessor_config.json")


def make_source(folder: Path, name: str) -> Path:
    """A family's small checkpoint with the example's tokenizer, and its image processor where there is vision."""
    families.tiny(folder, name, vocabulary=checkpoints.VOCABULARY)
    vision = "vision_config" in releases.read_json(folder / "config.json")
    for file in SIDECARS if vision else checkpoints.TOKENIZER_FILES:
        shutil.copy(checkpoints.EXAMPLE / file, folder / file)
    if name == "gemma4":
        (folder / "processor_config.json").write_text(json.dumps(GEMMA4_PROCESSOR))
        checkpoints.edit_json(
            folder / "tokenizer_config.json", lambda raw: raw.update(extra_special_tokens=GEMMA4_TOKENS)
        )
    return folder


def recipe(texts: Path, preset: str = "fast", *settings: str) -> Recipe:
    """Two short sequences. texts: a folder that releases.write_recipe wrote: the bundled ones take longer to read."""
    windows, length = TOKENS
    small = (
        "scheme.group_size=64",
        f'calibration.sources=[{{path="{texts}/prose.jsonl", kind="text", fields=["text"], rows=2}}]',
        "calibration.length=64",
        f'heldout.path="{texts}/heldout.txt"',
        f"heldout.windows={windows}",
        f"heldout.length={length}",
    )
    return load_recipe(preset, (*small, *settings))


def make_release(folder: Path, source: Path, texts: Path, *settings: str) -> Path:
    quantize(source, folder, recipe(texts, "fast", *settings), machine=releases.machine)
    return folder


def make_twin(folder: Path, release: Path) -> Path:
    """A release in BF16: each projection dequantized, under the release's names."""
    found = releases.tensors(release)
    stems = [name.removesuffix("weight_packed") for name in found if name.endswith("weight_packed")]
    whole = {name: value for name, value in found.items() if not name.startswith(tuple(stems))}
    experts = {f"{stem}weight": releases.dequantize(found, stem).to(torch.bfloat16) for stem in stems}
    folder.mkdir()
    save_file(whole | experts, folder / "model.safetensors", {"format": "pt"})
    raw = releases.read_json(release / "config.json")
    raw.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(raw))
    for file in filter(lambda file: (release / file).exists(), (*SIDECARS, "processor_config.json")):
        shutil.copy(release / file, folder / file)
    return folder
