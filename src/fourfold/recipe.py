"""What to do: frozen dataclasses read from TOML. An unknown key is an error with the nearest name.

Keys that a recipe file leaves out are those of the preset `best`.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from msgspec import Meta

from fourfold import formats
from fourfold.datatypes import FourfoldError, nearest
from fourfold.recipe_table import (
    OF_AN_ORIGIN,
    ORIGINS,
    anchor_paths,
    canonical,
    check_together,
    complete,
    flat,
    refuse_never_quantized,
)  # fmt: skip
from fourfold.schema import Schema, apply_override, choices, ranges

RECIPES = Path(__file__).parent / "recipes"
AUTO: Literal["auto"] = "auto"
GROUP_SIZES: tuple[Literal[128, 64, 32], ...] = (128, 64, 32)


@dataclass(frozen=True, kw_only=True)
class Source:
    """One source of calibration text. Exactly one of `builtin`, `path` and `dataset` is set.

    rows: Samples taken from it, of `calibration.length` tokens each.
    kind: `"text"` reads `fields` as plain text; `"chat"` renders messages with the model's own chat template;
        `"image"` reads an image, or a list of them, and what is said about it (docs/how-to/images.md).
    fields: Fields of a record that are read: for text any number, joined by a blank line; for chat the one that holds
        the messages; for images the one with the images, then the one with the messages or a caption.
    pixels: Largest image of a sample, in pixels; larger ones are scaled down. Of kind `"image"` alone.
    builtin: Name of a text that ships with fourfold; it decides `kind`, `fields` and `licence`.
    path: A .jsonl, .txt or .parquet file, relative to the recipe file.
    dataset: A data set of the Hub; `id@revision` pins its revision.
    config: The data set's configuration; empty for its only one.
    split: The data set's split.
    licence: Licence of the text, as the model card states it.
    """

    rows: Annotated[int, Meta(ge=1, le=2**24)]
    kind: Literal["text", "chat", "image"] = "text"
    fields: tuple[str, ...] = ("text",)
    pixels: Annotated[int, Meta(ge=2**10, le=2**24)] = 2**18
    builtin: str = ""
    path: str = ""
    dataset: str = ""
    config: str = ""
    split: str = "train"
    licence: str = ""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Samples of tokens whose statistics decide codes and scales.

    length: Tokens of each sample.
    seed: Seed of the shuffle of documents and of the draw of samples.
    allow_test_sets: Accept text of known test sets and of the held-out text, which makes figures measured on them
        meaningless.
    image_share: Share of the calibration weight that image tokens have in each expert that has seen both kinds,
        whatever their number; 0 weighs each token alike. Only with a source of kind `"image"`.
    sources: Sources of the text, one table each.
    """

    length: Annotated[int, Meta(ge=2, le=2**20)] = 1024
    seed: Annotated[int, Meta(ge=0, le=2**32 - 1)] = 0
    allow_test_sets: bool = False
    image_share: Annotated[float, Meta(ge=0, le=0.99)] = 0.0
    sources: tuple[Source, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Heldout:
    """Text on which perplexity and KL divergence are measured. It is never used for calibration.

    builtin: Name of a held-out text that ships with fourfold.
    path: A .jsonl, .txt or .parquet file instead.
    windows: Windows that are measured, from the start of the text.
    length: Tokens of each window.
    images: A .jsonl or .parquet file of images and conversations that are measured beside the text; left out, samples
        of the recipe's first source of images that are not calibrated on.
    image_windows: Windows of images that are measured.
    yardstick: Also measure the model with its experts rounded to nearest (RTN), on every second window.
    """

    builtin: str = "wikitext-2-test"
    path: str = ""
    windows: Annotated[int, Meta(ge=1, le=2**24)] = 16
    length: Annotated[int, Meta(ge=2, le=2**20)] = 2048
    images: str = ""
    image_windows: Annotated[int, Meta(ge=1, le=2**20)] = 4
    yardstick: bool = True


@dataclass(frozen=True, kw_only=True)
class Rest:
    """What is quantized beside the routed experts, by parts of the model; a part that a model lacks is left out.

    int8: symmetric, round-to-nearest with searched scales, each for 128 inputs, or 64 or 32 where that does not divide
    all of them. Routers, norms, embeddings and `mtp.fc`, which joins a draft head's inputs, stay as they are
    (docs/compact.md).

    attention: Projections of softmax attention.
    linear_attention: Large projections of linear attention and state space layers.
    shared_experts: Projections of shared experts; their gate stays BF16.
    head: The output head. SGLang makes drafts only with a BF16 head.
    draft_experts: Routed experts of the draft head (MTP); int4 is solved as the model's experts are.
    draft_dense: The draft head's attention and shared experts.
    """

    attention: Literal["bf16", "int8"] = "bf16"
    linear_attention: Literal["bf16", "int8"] = "bf16"
    shared_experts: Literal["bf16", "int8"] = "bf16"
    head: Literal["bf16", "int8"] = "bf16"
    draft_experts: Literal["bf16", "int8", "int4"] = "bf16"
    draft_dense: Literal["bf16", "int8", "int4"] = "bf16"


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Number format of the quantized weights: int4, symmetric, one scale for each group of input features.

    group_size: Input features that share a scale: 128, 64 or 32; `"auto"` takes the largest that divides all widths.
    signed: Scales may be negative, so that the longer side of the grid [-8, 7] falls where a group needs it.
    scale_dtype: Type of the stored scales; bf16 scales are exact in FP16 too.
    tensor_parallel: GPUs that will serve the release by tensor parallel: `group_size` fits their part of an expert too.
    rest: What is quantized beside the routed experts.
    """

    group_size: Literal["auto", 128, 64, 32] = "auto"
    signed: bool = True
    scale_dtype: Literal["bf16", "fp16"] = "bf16"
    tensor_parallel: Annotated[int, Meta(ge=1, le=64)] = 1
    rest: Rest = field(default_factory=Rest)

    @property
    def group(self) -> int:
        """The group size, once it is chosen for a model."""
        assert isinstance(self.group_size, int), "a plan chooses the group size"
        return self.group_size


@dataclass(frozen=True, kw_only=True)
class Solver:
    """How codes and scales are found. Each ingredient is one key; docs/numerics.md has the mathematics and ablations.

    asymmetric: Calibrate on the inputs that the quantized model gives each expert, and fit `down_proj` to what brings
        the residual stream closest to the source model's; false calibrates on the source model's inputs alone, in one
        stream.
    router_weighted: Weigh each token by its router weight for the expert.
    norm_power: Weigh each token by its hidden state x behind the layer, by (1 / |x|) to this power besides; 0 does not.
    pool: Weight of the layer-wide Hessian in each expert's: H' = (m H + n0 P) / (m + n0), with n0 = `pool` * K
        effective tokens; 0 gives each expert its own alone.
    effective_tokens: Count an expert's tokens m by their energy, so that a few loud tokens count as few; false counts
        them all.
    trace_matched: Scale the layer-wide Hessian P to the trace of each expert's own before they are mixed.
    pool_rows: Random tokens of the layer that go through each expert to make the pool of its `down_proj`, at least;
        five for each of its inputs where that is more.
    damp: Damping added to the diagonal of the Hessian, relative to what `damp_kind` names.
    damp_kind: `"diagonal"` damps each channel relative to its own diagonal entry; `"mean"` by the mean of the diagonal,
        as GPTQ does.
    damp_floor: Damping added besides, relative to the median of the diagonal, for channels that are nearly dead;
        of `damp_kind = "diagonal"` alone.
    order: Order in which columns are quantized: `"activation"` by falling diagonal, `"group-aware"` so within groups
        and groups by their largest entry (GPTQModel's GAR), or `"natural"`.
    scale: `"search"` tries `scale_steps` multiples of max|w| / 8 for each group; `"absmax"` takes max|w| * 2 / 15, as
        GPTQModel does.
    scale_weights: Weights of the search's squared errors: `"conditional"` is what remains of a column's curvature once
        later columns correct for it; `"diagonal"` is the diagonal of the Hessian.
    scale_low: Smallest scale of the search, as a multiple of max|w| / 8.
    scale_high: Largest scale of the search, as a multiple of max|w| / 8.
    scale_steps: Scales that the search tries for each sign, ends included.
    passes: Passes of coordinate descent over all groups after the column loop; 0 is none.
    refine_scales: Fit each group's scale again in every pass.
    fallback_share: Round an expert to nearest (RTN) if it gets fewer than this share of all calibration tokens; 0 never
        does.
    """

    asymmetric: bool = True
    router_weighted: bool = True
    norm_power: Annotated[float, Meta(ge=0, le=2)] = 0.5
    pool: Annotated[float, Meta(ge=0, le=1024)] = 0.5
    effective_tokens: bool = True
    trace_matched: bool = True
    pool_rows: Annotated[int, Meta(ge=1, le=2**20)] = 2048
    damp: Annotated[float, Meta(ge=0, le=1)] = 0.05
    damp_kind: Literal["diagonal", "mean"] = "diagonal"
    damp_floor: Annotated[float, Meta(ge=0, le=1)] = 1e-4
    order: Literal["activation", "group-aware", "natural"] = "activation"
    scale: Literal["search", "absmax"] = "search"
    scale_weights: Literal["conditional", "diagonal"] = "conditional"
    scale_low: Annotated[float, Meta(ge=0.01, le=4)] = 0.45
    scale_high: Annotated[float, Meta(ge=0.01, le=4)] = 1.15
    scale_steps: Annotated[int, Meta(ge=1, le=4096)] = 36
    passes: Annotated[int, Meta(ge=0, le=64)] = 2
    refine_scales: bool = True
    fallback_share: Annotated[float, Meta(ge=0, le=1)] = 0.0


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Weighs errors by the gradient of the model's loss (docs/numerics.md, section 13). Off unless `tokens` is set.

    tokens: Calibration tokens, in whole samples, that go forward and backward through the source model before
        quantization; 0 is no guidance.
    sites: Projections that are guided: `"both"` is gate, up and down; `"down"` is `down_proj` alone.
    damp: Damping of the metric relative to its diagonal; 0 chooses 0.05, 0.2 or 0.3 by tokens per hidden dimension.
    routing: Also weigh errors by what they do to the choice of experts of tokens near a tie (docs/numerics.md, section
        15). Of models whose router logits alone decide that choice.
    """

    tokens: Annotated[int, Meta(ge=0, le=2**24)] = 0
    sites: Literal["both", "down"] = "both"
    damp: Annotated[float, Meta(ge=0, le=1)] = 0.0
    routing: bool = False


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the result of `quantize`. Devices and memory are options of the command instead.

    name: Name of the recipe; left out, the file's name.
    description: One line for `fourfold recipe list`.
    format: Storage of the release: compressed-tensors, or GPTQ's with or without the zero-point offset
        (docs/formats.md).
    """

    name: str = "best"
    description: str = ""
    format: formats.Name = "compressed-tensors"
    scheme: Scheme = field(default_factory=Scheme)
    solver: Solver = field(default_factory=Solver)
    guidance: Guidance = field(default_factory=Guidance)
    calibration: Calibration = field(default_factory=Calibration)
    heldout: Heldout = field(default_factory=Heldout)

    def digest(self) -> str:
        """sha256 that names the run: of everything but the recipe's own name and description."""
        return hashlib.sha256(json.dumps(canonical(self._content()), sort_keys=True).encode()).hexdigest()

    def values(self) -> dict[str, Any]:
        """What the digest is of, in JSON types, by dotted keys as overrides have them."""
        return dict(flat(self._content()))

    @property
    def image_sources(self) -> tuple[Source, ...]:
        return tuple(source for source in self.calibration.sources if source.kind == "image")

    @property
    def reads_images(self) -> bool:
        """Whether images are calibrated on, or measured."""
        return bool(self.image_sources or self.heldout.images)

    def _content(self) -> dict[str, Any]:
        left_out = ("name", "description") if self.guidance.tokens else ("name", "description", "guidance")
        content = {key: value for key, value in asdict(self).items() if key not in left_out}
        if "guidance" in content and not self.guidance.routing:
            del content["guidance"]["routing"]
        for source in content["calibration"]["sources"]:
            if source["kind"] != "image":
                del source["pixels"]
        if not self.reads_images:
            del content["calibration"]["image_share"], content["heldout"]["images"], content["heldout"]["image_windows"]
        del content["scheme"]["tensor_parallel"]  # it decides the group size alone
        if self.scheme.rest == Rest():
            del content["scheme"]["rest"]
        del content["heldout"]["yardstick"]  # no byte of the release
        return content


CHOICES, RANGES = choices(Recipe), ranges(Recipe)


def recipe_names() -> tuple[str, ...]:
    """The presets that ship with fourfold."""
    return tuple(sorted(path.stem for path in RECIPES.glob("*.toml")))


def recipe_path(name_or_path: str) -> Path:
    """The TOML file behind a preset's name or a path. Raises FourfoldError with the nearest preset."""
    if name_or_path in recipe_names():
        return RECIPES / f"{name_or_path}.toml"
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    names = recipe_names()
    raise FourfoldError(
        f"recipe: got {name_or_path!r}, expected a preset ({', '.join(names)}) or the path of a .toml file."
        f"{nearest(name_or_path, names)}"
    )


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a preset or a .toml file and check every value.

    overrides: "solver.damp=0.02", "calibration.sources.0.rows=8"; the right side is TOML, or else plain text.
    A relative `path` is taken from the recipe file's folder, in an override from the working folder.
    An override of builtin, path or dataset drops the other two, and their config, split and licence.
    Raises FourfoldError naming the file or the override, the key, the value and what is expected.
    """
    path = recipe_path(name_or_path)
    table = _read_toml(path)
    table.setdefault("name", path.stem)
    calibration = table.setdefault("calibration", {})
    if isinstance(calibration, dict) and "sources" not in calibration:
        calibration["sources"] = _read_toml(RECIPES / "best.toml")["calibration"]["sources"]
    anchor_paths(table, path.parent.resolve())
    for override in overrides:
        apply_override(table, override, displaced=dict.fromkeys(ORIGINS, (*ORIGINS, *OF_AN_ORIGIN)))
    anchor_paths(table, Path.cwd())
    complete(table)
    typed = {override.partition("=")[0].replace(" ", ""): f"--set {override}" for override in overrides}
    schema = Schema(kind=Recipe, where=f"recipe {name_or_path}", typed=typed)
    refuse_never_quantized(table, schema)
    recipe: Recipe = schema.read(table)
    check_together(recipe, schema)
    return recipe


def resize_calibration(recipe: Recipe, samples: int | None, sequence_length: int | None) -> Recipe:
    """Return the recipe with `samples` calibration samples in all, of `sequence_length` tokens; None: as it has them.

    Sources keep their proportions, by largest remainders; one whose share is less than a sample is left out.
    Raises FourfoldError for a number out of range.
    """
    sizes = (("samples", samples, "sources.rows"), ("sequence_length", sequence_length, "length"))
    for name, value, key in sizes:
        least, most = RANGES[f"calibration.{key}"]
        if value is not None and not least <= value <= most:
            raise FourfoldError(f"{name}: got {value}, expected {least:,.0f} to {most:,.0f}")
    calibration = recipe.calibration
    if samples is not None:
        calibration = replace(calibration, sources=_share_out(calibration.sources, samples))
    if sequence_length is not None:
        calibration = replace(calibration, length=sequence_length)
    return replace(recipe, calibration=calibration)


def _share_out(sources: Sequence[Source], samples: int) -> tuple[Source, ...]:
    total = sum(source.rows for source in sources)
    shares = [divmod(source.rows * samples, total) for source in sources]
    by_remainder = sorted(range(len(sources)), key=lambda place: -shares[place][1])  # of equal ones, the first
    more = set(by_remainder[: samples - sum(whole for whole, _ in shares)])
    rows = [whole + (place in more) for place, (whole, _) in enumerate(shares)]
    return tuple(replace(source, rows=count) for source, count in zip(sources, rows, strict=True) if count)


def dump_recipe(recipe: Recipe) -> str:
    """TOML that `load_recipe` reads back as an equal recipe; complete, so it reproduces the run.

    Left out are empty strings, which mean "not given", what a bundled text decides by itself, and guidance where the
    preset `best` has none either.
    """
    table = asdict(recipe)
    if not recipe.reads_images:
        del table["calibration"]["image_share"], table["heldout"]["images"], table["heldout"]["image_windows"]
    if recipe.guidance == Guidance():
        del table["guidance"]
    if recipe.scheme.rest == Rest():
        del table["scheme"]["rest"]
    sources = table["calibration"].pop("sources")
    text = tomli_w.dumps(table | {"heldout": _given(table["heldout"])})
    for source in sources:
        facts = ("kind", "fields", "split") if source["builtin"] else () if source["dataset"] else ("split",)
        facts = facts if source["kind"] == "image" else (*facts, "pixels")
        kept = {key: value for key, value in _given(source).items() if key not in facts}
        text += "\n[[calibration.sources]]\n" + tomli_w.dumps(kept)
    return text


def _given(table: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if value != ""}


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FourfoldError(f"recipe {path}: not TOML: {error}") from None
    except OSError as error:
        raise FourfoldError(f"recipe {path}: cannot be read: {error.strerror}") from None
