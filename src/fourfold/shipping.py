"""The commands that look at releases, move and publish them, and their options: inspect, convert, compare, publish."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fourfold import tables, terminal
from fourfold.options import EXIT_CODES, Quiet, answer

INSPECT_EXAMPLES = f"""\b
Examples:
  fourfold inspect ./release
  fourfold inspect Qwen/Qwen3.6-35B-A3B --json

{EXIT_CODES}"""
CONVERT_EXAMPLES = f"""\b
Examples:
  fourfold convert ./release ./release-gptq --format gptq
  fourfold convert someone/Qwen3.6-35B-A3B-GPTQ-Int4 ./mended --format compressed-tensors

{EXIT_CODES}"""


class FormatChoice(StrEnum):
    """Storages of int4 that engines load."""

    COMPRESSED_TENSORS = "compressed-tensors"
    GPTQ = "gptq"
    GPTQ_V2 = "gptq_v2"


# --- inspect ---------------------------------------------------------------------------------------------------------

Checkpoint = Annotated[
    str, typer.Argument(metavar="DIR", show_default=False, help="Folder of any checkpoint, or org/name of the Hub.")
]
InspectJson = Annotated[bool, typer.Option("--json", help="Print it as one JSON object.")]


def inspect(folder: Checkpoint, as_json: InspectJson = False) -> None:
    """Say of any checkpoint what is quantized how, what engines take it, and what traps it has.

    Reads the headers, and the values of one expert in each layer. Whoever made it: fourfold, GPTQModel, llm-compressor,
    AutoRound, or the BF16 original.
    """
    with answer():
        from fourfold.model.hub import resolve_model
        from fourfold.release.inspect import inspect as look

        found = look(resolve_model(folder, progress=not as_json))
        console = terminal.open_console()
        if as_json:
            terminal.json_line(console, found.to_json())
        else:
            tables.show_inspection(console, found)


# --- convert ---------------------------------------------------------------------------------------------------------

AnyRelease = Annotated[
    str,
    typer.Argument(
        metavar="OUT",
        show_default=False,
        help="An int4 release of any maker: a folder, or org/name of the Hub.",
    ),
]
New = Annotated[Path, typer.Argument(metavar="NEW", show_default=False, help="Folder to write: new or empty.")]
Format = Annotated[
    FormatChoice,
    typer.Option(
        "--format", metavar="gptq|gptq_v2|compressed-tensors", show_default=False, help="How NEW stores int4."
    ),
]
ConvertJson = Annotated[bool, typer.Option("--json", help="Print what came of it as one JSON object.")]


def convert(out: AnyRelease, new: New, *, format: Format, quiet: Quiet = False, as_json: ConvertJson = False) -> None:
    """Write a release in another storage: same codes, no calibration, no source.

    Scales are rounded to values that BF16 and FP16 both hold, and draft experts in one stack are split. It mends
    GPTQ releases whose drafts SGLang drops (--format compressed-tensors). Memory does not grow with the release.
    """
    with answer(None, "Nothing is left of it."):
        console = terminal.open_console()
        manner = terminal.Manner.QUIET if as_json else terminal.choose(console, as_json=False, quiet=quiet)
        from fourfold.model.hub import resolve_model
        from fourfold.release.convert import convert as run

        folder = resolve_model(out, progress=not (quiet or as_json))
        with terminal.watch(console, manner) as progress:
            found = run(folder, new, format.value, progress=progress)
        if as_json:
            terminal.json_line(console, found.to_json())
        elif not quiet:
            tables.show_converted(console, found)
