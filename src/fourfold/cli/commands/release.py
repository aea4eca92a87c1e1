"""The commands that work with a finished release: report, inspect, convert, compare, publish."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from fourfold import api
from fourfold.cli.console import open_console, plain, say
from fourfold.cli.errors import CHECK_FAILED, when_stopped
from fourfold.cli.options import Output, Release, RepoId, choice, read_size, value
from fourfold.cli.tables import release as tables
from fourfold.datatypes import FourfoldError
from fourfold.formats import EXPORTS, NAMES
from fourfold.formats.gguf import NAME as GGUF
from fourfold.formats.gguf import RESTS


def report(
    out: Release,
    /,
    *,
    against: Annotated[Path | None, Parameter(metavar="OUT2")] = None,
    repo: RepoId | None = None,
    base_model: RepoId | None = None,
    license: Annotated[str | None, Parameter(metavar="NAME")] = None,
    quiet: Annotated[bool, Parameter(alias="-q")] = False,
) -> None:
    """Write a release's model card, its plots and report.html.

    Reads only the results of quantize, evaluate, verify and bench in OUT (bench.json if it is there) and measures
    nothing. Missing results are listed as not measured. For GGUF and MLX only the card is written.

    Args:
        against: Second release of fourfold, shown beside this one.
        repo: Repository of the release on the Hub, for commands on the card. Default: the folder's name.
        base_model: Hugging Face model ID of the source. Default: the ID that quantize was given.
        license: License as the Hub names it. Default: from the source's card or LICENSE file.
        quiet: Print only errors.

    Examples:
        fourfold report ./release --repo me/Qwen3.6-35B-A3B-int4 --base-model Qwen/Qwen3.6-35B-A3B
        fourfold report ./release --against ./other
    """
    written, missing = api.report(out, against=against, repo=repo, base_model=base_model, licence=license)
    console = open_console()
    for line in [*(f"{plain(path)}: {what}" for path, what in written.items()), *missing] if not quiet else ():
        say(console, line)


def inspect(folder: Annotated[str, Parameter(name="DIR")], /, *, json: bool = False) -> None:
    """Show how a checkpoint is quantized and what loads it.

    Names known issues, too. Reads the headers, norms, the values of one expert per layer and the first bytes of all
    experts of any maker's checkpoint: fourfold, GPTQModel, llm-compressor, AutoAWQ, AutoRound, or the BF16 original.

    Args:
        folder: Any checkpoint: local path or Hugging Face model ID.
        json: Print the result as one JSON object.

    Examples:
        fourfold inspect ./release
        fourfold inspect Qwen/Qwen3.6-35B-A3B --json
    """
    from fourfold.quantize.journal import check_checkpoint
    from fourfold.release.contents import read_export

    output = Output(json=json)
    if (record := read_export(Path(folder))) is not None:
        output.present(lambda _: record, lambda console, found: tables.show_export(console, folder, found))
        return
    check_checkpoint(folder, whole=False)
    from fourfold.model.hub import resolve_model
    from fourfold.release.inspect import inspect as look

    output.present(lambda _: look(resolve_model(folder, progress=not json)), tables.show_inspection)


def convert(
    out: str,
    new: Path,
    /,
    *,
    format: Annotated[str, choice("FORMAT", *NAMES, *EXPORTS)],
    rest: Annotated[str | None, choice("DTYPE", *RESTS)] = None,
    mtp: Annotated[bool, Parameter(negative="--no-mtp")] = True,
    shard_size: Annotated[int | None, value(read_size, "SIZE")] = None,
    output: Output = Output(),
) -> None:
    """Write a release in another format, with the same codes.

    Needs neither calibration nor source. gguf and mlx hold codes and scales exactly. The other formats round scales to
    values exact in BF16 and FP16 and split stacks of draft experts, so that SGLang loads the drafts of a GPTQ release
    (--format compressed-tensors). Memory does not grow with the release.

    Args:
        out: int4 release of any maker: local path or Hugging Face model ID.
        new: Folder to write: new or empty.
        format: Format of NEW.
        rest: gguf: data type of matrices that are not quantized. Default: bf16, unchanged; the others round.
        mtp: gguf: include the draft (MTP) head. Ollama 0.21 to 0.24 cannot load it: use --no-mtp.
        shard_size: gguf: largest size of a file, as in 40GB. Default: one file.

    Examples:
        fourfold convert ./release ./release-gptq --format gptq
        fourfold convert ./release ./release-gguf --format gguf
        fourfold convert someone/Qwen3.6-35B-A3B-GPTQ-Int4 ./fixed --format compressed-tensors
    """
    with when_stopped("Nothing of it is kept."):
        from fourfold.model.files import check_new
        from fourfold.quantize.journal import check_checkpoint

        check_new(new, check_checkpoint(out, whole=True))
        from fourfold.model.hub import resolve_model
        from fourfold.release.convert import convert as run
        from fourfold.release.export import Options, export

        if (rest, mtp, shard_size) != (None, True, None) and format != GGUF:
            raise FourfoldError(f"--rest, --no-mtp, --shard-size: got --format {format}, expected --format gguf")
        folder = resolve_model(out, progress=not output.silent)
        if format in EXPORTS:
            options = Options(rest=rest or "bf16", mtp=mtp, shard_bytes=shard_size or 0)
            output.present(
                lambda progress: export(folder, new, format, options=options, progress=progress), tables.show_exported
            )
        else:
            output.present(lambda progress: run(folder, new, format, progress=progress), tables.show_converted)


def compare(
    first: Annotated[str, Parameter(name="A")],
    second: Annotated[str, Parameter(name="B")],
    /,
    *,
    equal: bool = False,
    output: Output = Output(),
) -> int:
    """Compare two checkpoints: tensors, codes, scales, metrics.

    Compares values, not formats: the same codes and scales are equal in GPTQ and compressed-tensors, an expert in a
    stack equals the same expert in a tensor of its own. GGUF and MLX output of convert is compared with a release.

    Args:
        first: Checkpoint: local path or Hugging Face model ID.
        second: Another one, in any format.
        equal: Exit with code 1 unless all weights are the same.

    Examples:
        fourfold compare ./release ./release-gptq
        fourfold compare ./release ./other --equal --json
    """
    from fourfold.quantize.journal import check_checkpoint
    from fourfold.release.contents import read_export

    for model in (first, second):
        if read_export(Path(model)) is None:
            check_checkpoint(model, whole=False)
    from fourfold.model.hub import resolve_model
    from fourfold.release.compare import compare as run

    a, b = (resolve_model(model, progress=not output.silent) for model in (first, second))
    found = output.present(lambda progress: run(a, b, progress=progress), tables.show_comparison)
    return CHECK_FAILED if equal and not found.same else 0


def publish(
    out: Release,
    repo: str,
    /,
    *,
    include: Annotated[tuple[str, ...], Parameter(metavar="FILE")] = (),
    private: bool = False,
    branch: Annotated[str, Parameter(metavar="NAME")] = "main",
    force: Annotated[str, Parameter(metavar="REASON")] = "",
    sign: Annotated[str, Parameter(metavar="KEY|keyless")] = "",
    dry_run: bool = False,
    output: Output = Output(),
) -> None:
    """Upload a verified release to the Hugging Face Hub.

    Sends the files that fourfold wrote and those that --include names; other files in OUT are listed and not sent.
    Hashes every file first. Rerun the same command to resume. Uses the token of `hf auth login`; fourfold does not ask
    for it and never prints it.

    Args:
        repo: Repository on the Hub, as org/name; created if needed.
        include: Send this file of OUT too, although fourfold did not write it. Repeatable.
        private: Make the repository private; refuse an existing public one.
        branch: Branch of REPO; created if needed.
        force: Publish although verify has not passed for these files. The card shows the reason.
        sign: Sign what is sent, as model.sig: with a private key (PEM file, elliptic curve), or keyless with Sigstore.
            fourfold verify --signature checks it. Needs the extra sign.
        dry_run: Print every file with size and sha256; send nothing.

    Examples:
        fourfold publish ./release me/Qwen3.6-35B-A3B-int4 --dry-run
        fourfold publish ./release me/Qwen3.6-35B-A3B-int4 --private
    """
    with when_stopped("Sent files are kept. Rerun the same command to resume."):
        from huggingface_hub.utils.tqdm import disable_progress_bars

        from fourfold.release.publish import publish as run

        if output.silent:
            disable_progress_bars()
        output.present(
            lambda progress: run(
                out, repo, include=include, private=private, branch=branch, force=force, sign=sign,
                dry_run=dry_run, progress=progress,
            ),
            lambda console, found: tables.show_published(console, found, dry_run),
        )  # fmt: skip
