"""Options that several commands share, and how their values are read. A dataclass is a group, a field an option."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, TypeVar

from cyclopts import Group, Parameter
from rich.console import Console

from fourfold import formats
from fourfold.cli.console import open_console, print_json
from fourfold.cli.progress import OutputMode, choose_mode, show_progress
from fourfold.datatypes import FourfoldError, Progress

if TYPE_CHECKING:
    from fourfold.recipe import Recipe

RELEASE_ENGINES = ("vllm", "sglang")
ENGINES = (*RELEASE_ENGINES, "llama.cpp", "mlx")  # the last two run what `convert` wrote
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt])(i?)b?", re.IGNORECASE)
POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}
OUTPUT = Group("Output", sort_key=9)


class HasJson(Protocol):
    def to_json(self) -> dict[str, Any]: ...


Result = TypeVar("Result", bound=HasJson)


def value(read: Callable[[str], object], metavar: str, **more: Any) -> Parameter:
    """An option with one value. read: raises ValueError for text that is no such value."""
    return Parameter(
        converter=lambda _, tokens: read(tokens[0].value), metavar=metavar, n_tokens=1, accepts_keys=False, **more
    )


def number(kind: type[int] | type[float], least: float, most: float = math.inf, metavar: str = "N") -> Parameter:
    """A number from `least` to `most`, both included."""
    what = "a whole number" if kind is int else "a number"
    expected = f"{what} from {least:g} to {most:g}" if most < math.inf else f"{what}, at least {least:g}"

    def read(text: str) -> float:
        with suppress(ValueError):
            if least <= (found := kind(text)) <= most:
                return found
        raise ValueError(f"got {text!r}, expected {expected}")

    return value(read, metavar)


def choice(metavar: str, *names: str) -> Parameter:
    """One of a few words."""
    return Parameter(metavar=metavar, choices=names)


def read_size(text: str) -> int:
    """Bytes of "8GiB", "8G" (the same), "8GB" (10^9) or "512MiB". Raises ValueError."""
    match = SIZE.fullmatch(text.strip())
    if not match:
        raise ValueError(f"got {text!r}, expected a number with a unit, as in 8GiB or 512MiB")
    amount, prefix, binary = match.groups()
    decimal = text.strip()[-1] in "bB" and not binary
    size = int(float(amount) * (1000 if decimal else 1024) ** POWERS[prefix.lower()])
    if size <= 0:
        raise ValueError(f"got {text!r}, expected more than nothing, as in 8GiB")
    return size


def read_layers(text: str) -> range:
    """Layers of "4" or "0-3", both ends included, counted from 0. Raises ValueError."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip(), re.ASCII)
    if not match:
        raise ValueError(f"got {text!r}, expected a first and a last layer, counted from 0, as in 0-3")
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise ValueError(f"got {text!r}, which ends before it starts. Did you mean {last}-{first}?")
    return range(first, last + 1)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Bytes of each device and of the host; None for what is free."""

    memory_bytes: int | None = None
    host_bytes: int | None = None


def read_budget(text: str) -> Budget:
    """ "10GiB", or by place as in "cuda=10GiB,host=8GiB" or "cpu=3GiB,host=6GiB". Raises ValueError."""
    if "=" not in text:
        return Budget(memory_bytes=read_size(text))
    sizes: dict[str, int] = {}
    for part in text.split(","):
        place, _, size = (word.strip() for word in part.partition("="))
        if place not in ("cuda", "cpu", "host") or place in sizes:
            raise ValueError(f"{part.strip()}: expected cuda=SIZE or cpu=SIZE, and host=SIZE, each once")
        sizes[place] = read_size(size)
    if len(sizes.keys() & {"cuda", "cpu"}) != 1:
        raise ValueError(f"got {text!r}, expected cuda=SIZE or cpu=SIZE beside host=SIZE")
    return Budget(memory_bytes=sizes.get("cuda") or sizes.get("cpu"), host_bytes=sizes.get("host"))


def read_file(text: str) -> Path:
    """The path of a file that exists. Raises ValueError."""
    if not Path(text).is_file():
        raise ValueError(f"{text!r} {'is a folder' if Path(text).is_dir() else 'does not exist'}, expected a file")
    return Path(text)


ExistingFile = Annotated[Path, value(read_file, "FILE")]
OutputFile = Annotated[Path, Parameter(metavar="FILE")]
ModelId = Annotated[str, Parameter(metavar="MODEL")]
RepoId = Annotated[str, Parameter(metavar="ORG/NAME")]
Engine = Annotated[str, choice("ENGINE", *ENGINES)]
Model = Annotated[str, Parameter(help="Local path or Hugging Face model ID, as org/name or org/name@revision.")]
Release = Annotated[Path, Parameter(help="Folder of a finished release.")]
EnginePython = Annotated[
    Path | None,
    Parameter(
        metavar="PATH", help="Python of the engine's environment. Default: the first on PATH that has the engine."
    ),
]


@Parameter(name="*", group=Group("Recipe", sort_key=1))
@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """What decides the result of a run."""

    recipe: Annotated[str, Parameter(alias="-r", metavar="NAME|FILE")] = "best"
    """Preset (see `fourfold recipe list`) or .toml file."""
    overrides: Annotated[tuple[str, ...], Parameter(name="--set", metavar="KEY=VALUE")] = ()
    """Change one value of the recipe, as in solver.passes=3. Repeatable."""
    format: Annotated[str | None, choice("FORMAT", *formats.NAMES)] = None
    """Storage of the release. Default: the recipe's."""
    calibration: ExistingFile | None = None
    """Calibrate on this file instead of the recipe's sources: .txt, or .jsonl or .parquet with a field `text` (plain
    text) or `messages` (conversations, rendered with the model's chat template)."""
    samples: Annotated[int | None, number(int, 1)] = None
    """Total number of calibration samples; the recipe's sources keep their proportions. Default: the recipe's."""
    sequence_length: Annotated[int | None, number(int, 2, metavar="TOKENS")] = None
    """Tokens per sample. Default: the recipe's."""
    tensor_parallel: Annotated[int | None, Parameter(name="--tp"), number(int, 1, 64, "GPUS")] = None
    """Tensor-parallel size planned for serving. The group size then divides each GPU's part of an expert."""

    def load(self) -> Recipe:
        """The recipe with these changes. A calibration file replaces all sources and keeps their number of samples."""
        from fourfold import recipe as recipes

        changes = {"scheme.tensor_parallel": self.tensor_parallel, "format": self.format}
        overrides = [f"{key}={value}" for key, value in changes.items() if value]
        chosen = recipes.load_recipe(self.recipe, [*self.overrides, *overrides])
        if self.calibration is not None:
            kind, field = text_kind(self.calibration)
            rows = sum(source.rows for source in chosen.calibration.sources)
            source = recipes.Source(rows=rows, kind=kind, fields=(field,), path=str(self.calibration.absolute()))
            chosen = replace(chosen, calibration=replace(chosen.calibration, sources=(source,)))
        return recipes.resize_calibration(chosen, self.samples, self.sequence_length)


@Parameter(name="*", group=Group("Machine", sort_key=2))
@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where a run works, and on which layers."""

    devices: Annotated[str, Parameter(metavar="DEVICE")] = "auto"
    """auto (the first GPU, or else the CPU), all, cuda:0,cuda:1, cpu, or cpu*4 for four workers on the CPU. Several
    devices share the work."""
    memory: Annotated[Budget, value(read_budget, "SIZE", show_default=False)] = Budget()
    """Memory limit per GPU, or of the CPU in total, as in 8GiB. Or separate limits: cuda=10GiB,host=8GiB (cpu=SIZE is
    then per worker). A lower limit means smaller batches. Default: the free memory."""
    layers: Annotated[range | None, value(read_layers, "A-B")] = None
    """Trial run: quantize only layers A to B, counted from 0. The output is marked partial."""

    def arguments(self) -> dict[str, Any]:
        """As arguments of api.plan and api.quantize."""
        return {"devices": self.devices, "layers": self.layers, **asdict(self.memory)}


@Parameter(name="*", group=OUTPUT)
@dataclass(frozen=True, kw_only=True)
class Output:
    """How a command shows progress and its result."""

    quiet: Annotated[bool, Parameter(alias="-q")] = False
    """Print only errors."""
    json: bool = False
    """Print the result as one JSON object."""

    @property
    def silent(self) -> bool:
        """Whether stdout belongs to a program, or to nobody."""
        return self.quiet or self.json

    def present(
        self, work: Callable[[Progress], Result], show: Callable[[Console, Result], None], kind: str = ""
    ) -> Result:
        """Do the work with a progress display, print its result and return it. kind: of the result, among events."""
        console = open_console()
        mode = OutputMode.JSON if self.json and kind else OutputMode.QUIET if self.silent else choose_mode(console)
        with show_progress(console, mode) as progress:
            result = work(progress)
        if self.json:
            data = result.to_json()
            print_json(console, {"kind": kind, "data": data} if kind else data)
        elif not self.quiet:
            show(console, result)
        return result


@Parameter(name="*", group=OUTPUT)
@dataclass(frozen=True, kw_only=True)
class EventOutput(Output):
    """The same for a command that reports its events."""

    json: bool = False
    """Print events as JSON lines, the result last."""


def text_kind(path: Path) -> tuple[Literal["text", "chat"], str]:
    """Kind and field of a calibration file: `messages` (chat), else `text`. Raises FourfoldError for other files."""
    from fourfold.recipe_table import FILE_KINDS

    if path.suffix not in FILE_KINDS:
        expected = ", ".join(FILE_KINDS)
        raise FourfoldError(f"--calibration {path}: got {path.suffix or 'no suffix'}, expected one of {expected}")
    try:
        names = _field_names(path)
    except (OSError, ValueError) as error:  # pyarrow's and json's errors are ValueErrors
        raise FourfoldError(f"{path}: cannot be read as {path.suffix}: {error}") from None
    if "messages" in names:
        return "chat", "messages"
    if "text" in names:
        return "text", "text"
    fix = "For others write a recipe with [[calibration.sources]] and `fields`: start from `fourfold recipe show best`"
    got = f"got the fields {', '.join(names) or '(none)'}, expected `messages` or `text`"
    raise FourfoldError(f"--calibration {path}: {got}. {fix}")


def _field_names(path: Path) -> list[str]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return list(pyarrow.parquet.read_schema(path).names)
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as lines:
            first = json.loads(next(filter(str.strip, lines), "{}"))
        return list(first) if isinstance(first, dict) else []
    return ["text"]
