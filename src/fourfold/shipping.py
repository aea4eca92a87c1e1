"""The commands that look at releases, move and publish them, and their options: inspect, convert, compare, publish."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from fourfold import terminal
from fourfold.datatypes import FourfoldError
from fourfold.formats import EXPORTS, NAMES
from fourfold.formats.gguf import NAME as GGUF
from fourfold.formats.gguf import RESTS
from fourfold.options import CHECK_FAILED, EXIT_CODES, Quiet, Release, answer, choice, parse_size
from fourfold.tables.release import (
    show_comparison,
    show_converted,
    show_export,
    show_exported,
    show_inspection,
    show_published,
)

INSPECT_EXAMPLES = f"""\b
Examples:
  fourfold inspect ./release
  fourfold inspect Qwen/Qwen3.6-35B-A3B --json

{EXIT_CODES}"""
CONVERT_EXAMPLES = f"""\b
Examples:
  fourfold convert ./release ./release-gptq --format gptq
  fourfold convert ./release ./release-gguf --format gguf
  fourfold convert someone/Qwen3.6-35B-A3B-GPTQ-Int4 ./mended --format compressed-tensors

{EXIT_CODES}"""

COMPARE_EXAMPLES = f"""\b
Examples:
  fourfold compare ./release ./release-gptq
  fourfold compare ./release ./other --equal --json

{EXIT_CODES}"""
PUBLISH_EXAMPLES = f"""\b
Examples:
  fourfold publish ./release me/Qwen3.6-35B-A3B-int4 --dry-run
  fourfold publish ./release me/Qwen3.6-35B-A3B-int4 --private

{EXIT_CODES}"""


# --- inspect ---------------------------------------------------------------------------------------------------------

Checkpoint = Annotated[
    str, typer.Argument(metavar="DIR", show_default=False, help="Folder of any checkpoint, or org/name of the Hub.")
]
InspectJson = Annotated[bool, typer.Option("--json", help="Print it as one JSON object.")]


def inspect(folder: Checkpoint, as_json: InspectJson = False) -> None:
    """Show how a checkpoint is quantized and what loads it.

    Names known issues, too. Reads the headers, and the values of one expert in each layer, of any maker's checkpoint:
    fourfold, GPTQModel, llm-compressor, AutoRound, or the BF16 original.
    """
    with answer():
        from fourfold.quantize.journal import check_checkpoint
        from fourfold.release.contents import read_export

        console = terminal.open_console()
        if (record := read_export(Path(folder))) is not None:
            if as_json:
                terminal.json_line(console, record.to_json())
            else:
                show_export(console, folder, record)
            return
        check_checkpoint(folder, whole=False)
        from fourfold.model.hub import resolve_model
        from fourfold.release.inspect import inspect as look

        found = look(resolve_model(folder, progress=not as_json))
        if as_json:
            terminal.json_line(console, found.to_json())
        else:
            show_inspection(console, found)


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
    str, typer.Option("--format", **choice(*NAMES, *EXPORTS), show_default=False, help="How NEW stores int4.")
]
Rest = Annotated[
    str | None,
    typer.Option(
        "--rest",
        **choice(*RESTS),
        show_default=False,
        help="gguf: what other matrices than experts become. Default: bf16, as they are; the others round.",
    ),
]
Mtp = Annotated[
    bool, typer.Option("--mtp/--no-mtp", help="gguf: keep the draft (MTP) head; Ollama 0.21 to 0.24 fails on it.")
]
ShardSize = Annotated[
    int | None,
    typer.Option(
        "--shard-size",
        metavar="SIZE",
        parser=parse_size,
        show_default=False,
        help="gguf: files of at most this size, as in 40GB. Default: one file.",
    ),
]
ConvertJson = Annotated[bool, typer.Option("--json", help="Print what came of it as one JSON object.")]


def convert(
    out: AnyRelease,
    new: New,
    *,
    format: Format,
    rest: Rest = None,
    mtp: Mtp = True,
    shard_size: ShardSize = None,
    quiet: Quiet = False,
    as_json: ConvertJson = False,
) -> None:
    """Write a release in another format, with the same codes.

    Needs neither calibration nor source. gguf and mlx hold codes and scales exactly. The others round scales to values
    that BF16 and FP16 both hold, and split stacks of draft experts, which fixes GPTQ releases whose drafts SGLang drops
    (--format compressed-tensors). Memory does not grow with the release.
    """
    with answer(None, "Nothing is left of it."):
        console = terminal.open_console()
        manner = terminal.Manner.QUIET if as_json else terminal.choose(console, as_json=False, quiet=quiet)
        from fourfold.model.files import check_new
        from fourfold.quantize.journal import check_checkpoint

        check_new(new, check_checkpoint(out, whole=True))
        from fourfold.model.hub import resolve_model
        from fourfold.release.convert import convert as run
        from fourfold.release.export import Options, export

        show = show_exported if format in EXPORTS else show_converted
        asked = (rest, mtp, shard_size) != (None, True, None)
        if asked and format != GGUF:
            raise FourfoldError(f"--rest, --no-mtp, --shard-size: got --format {format}, expected --format gguf")
        options = Options(rest=rest or "bf16", mtp=mtp, shard_bytes=shard_size or 0)
        write: Any = partial(export, options=options) if format in EXPORTS else run
        folder = resolve_model(out, progress=not (quiet or as_json))
        with terminal.watch(console, manner) as progress:
            found: Any = write(folder, new, format, progress=progress)
        if as_json:
            terminal.json_line(console, found.to_json())
        elif not quiet:
            show(console, found)


# --- compare ---------------------------------------------------------------------------------------------------------

First = Annotated[str, typer.Argument(metavar="A", show_default=False, help="A checkpoint: folder, or org/name.")]
Second = Annotated[str, typer.Argument(metavar="B", show_default=False, help="Another, in whatever storage.")]
MustBeEqual = Annotated[bool, typer.Option("--equal", help="Exit with 1 unless every weight is the same.")]
CompareJson = Annotated[bool, typer.Option("--json", help="Print it as one JSON object.")]


def compare(
    first: First, second: Second, equal: MustBeEqual = False, quiet: Quiet = False, as_json: CompareJson = False
) -> None:
    """Compare two checkpoints: tensors, codes, scales, metrics.

    Formats are looked through: the same codes and scales are equal in GPTQ and compressed-tensors, an expert in a stack
    equals the same in a tensor of its own. What convert wrote as GGUF or for MLX is compared with a release.
    """
    with answer():
        console = terminal.open_console()
        manner = terminal.Manner.QUIET if as_json else terminal.choose(console, as_json=False, quiet=quiet)
        from fourfold.quantize.journal import check_checkpoint
        from fourfold.release.contents import read_export

        for model in (first, second):
            if read_export(Path(model)) is None:
                check_checkpoint(model, whole=False)
        from fourfold.model.hub import resolve_model
        from fourfold.release.compare import compare as run

        folders = [resolve_model(model, progress=not (quiet or as_json)) for model in (first, second)]
        with terminal.watch(console, manner) as progress:
            found = run(folders[0], folders[1], progress=progress)
        if as_json:
            terminal.json_line(console, found.to_json())
        elif not quiet:
            show_comparison(console, found)
        if equal and not found.same:
            raise typer.Exit(CHECK_FAILED)


# --- publish ---------------------------------------------------------------------------------------------------------

Repo = Annotated[str, typer.Argument(metavar="REPO", show_default=False, help="org/name on the Hub; made if need be.")]
Include = Annotated[
    list[str] | None,
    typer.Option(
        "--include",
        metavar="FILE",
        show_default=False,
        help="Send this file of OUT too, though fourfold did not write it. Repeatable.",
    ),
]
Private = Annotated[bool, typer.Option("--private", help="Make it private; refuse one that is there and public.")]
Branch = Annotated[str, typer.Option("--branch", metavar="NAME", help="Branch of REPO; made if need be.")]
Force = Annotated[
    str,
    typer.Option(
        "--force",
        metavar="REASON",
        show_default=False,
        help="Publish although verify has not passed for these bytes. The card shows the reason.",
    ),
]
PublishDryRun = Annotated[bool, typer.Option("--dry-run", help="Print every file, its size and sha256; send nothing.")]
PublishJson = Annotated[bool, typer.Option("--json", help="Print it as one JSON object.")]


def publish(
    out: Release,
    repo: Repo,
    include: Include = None,
    private: Private = False,
    branch: Branch = "main",
    force: Force = "",
    dry_run: PublishDryRun = False,
    quiet: Quiet = False,
    as_json: PublishJson = False,
) -> None:
    """Upload a verified release to the Hugging Face Hub.

    Sends the files that fourfold wrote and those that --include names; the rest of OUT is named and stays. Every file
    is hashed first. Rerun the same command to resume. `hf auth login` holds the token; fourfold does not ask for it and
    never prints it.
    """
    with answer(None, "What was sent is kept: the same command goes on."):
        console = terminal.open_console()
        manner = terminal.Manner.QUIET if as_json else terminal.choose(console, as_json=False, quiet=quiet)
        from huggingface_hub.utils.tqdm import disable_progress_bars

        from fourfold.release.publish import publish as run

        if quiet or as_json:
            disable_progress_bars()
        with terminal.watch(console, manner) as progress:
            found = run(
                out,
                repo,
                include=include or (),
                private=private,
                branch=branch,
                force=force,
                dry_run=dry_run,
                progress=progress,
            )
        if as_json:
            terminal.json_line(console, found.to_json())
        elif not quiet:
            show_published(console, found, dry_run)
