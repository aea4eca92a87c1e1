"""The commands around all others: release, from beginning to end, and doctor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from fourfold.cli import options
from fourfold.cli.console import facts_table, grid, open_console, paragraphs, plain, say, show_table
from fourfold.cli.errors import CHECK_FAILED, when_stopped
from fourfold.cli.progress import choose_mode, show_progress
from fourfold.cli.tables.run import show_plan
from fourfold.units import clock_text

if TYPE_CHECKING:
    from rich.console import Console

    from fourfold.doctor import Findings
    from fourfold.pipeline import Released


def release(
    model: options.Model,
    repo: options.RepoId,
    /,
    *,
    out: Annotated[Path | None, Parameter(metavar="OUT")] = None,
    also: Annotated[str, Parameter(metavar="FORMATS")] = "",
    base_model: options.RepoId | None = None,
    license: Annotated[str | None, Parameter(metavar="NAME")] = None,
    private: bool = False,
    recipe: options.RecipeOptions = options.RecipeOptions(),
    run: options.RunOptions = options.RunOptions(),
    derived: bool = False,
    dry_run: bool = False,
    output: options.EventOutput = options.EventOutput(),
) -> int:
    """Make a release of MODEL and publish it as REPO.

    Quantizes, evaluates, verifies, writes the card, converts and publishes. Resumable: rerun the same command; finished
    steps are not repeated. verify runs the engines that are installed. A failed check stops it before anything is
    published, with the report written and exit code 1.

    Args:
        repo: Repository on the Hub, as org/name. GGUF and MLX go to REPO-GGUF and REPO-MLX.
        out: Folder of the release; exports are written beside it. Default: REPO's name.
        also: Convert and publish these, too: gguf, mlx, or gguf,mlx.
        base_model: Hugging Face model ID of the source. Default: MODEL where it is one.
        license: License as the Hub names it. Default: from the source's card or LICENSE file.
        private: Make the repositories private; refuse existing public ones.
        derived: Allow an untested architecture if a small copy with random weights runs as in transformers.
        dry_run: Print the plan and every step with sizes and predicted times; do nothing.

    Examples:
        fourfold release Qwen/Qwen3.6-35B-A3B me/Qwen3.6-35B-A3B-int4 --also gguf,mlx --dry-run
        fourfold release ./model me/model-int4 --recipe guided --private
    """
    from fourfold import pipeline

    folder = out or Path(repo.rpartition("/")[2] or "release")
    with when_stopped("Finished steps are kept. Rerun the same command to resume.", folder):
        wanted = pipeline.Wanted(
            model=model, repo=repo, out=folder, recipe=recipe.load(), derived=derived, private=private,
            also=tuple(dict.fromkeys(name.strip() for name in also.split(",") if name.strip())),
            run=run.arguments(), base_model=base_model, licence=license,
        )  # fmt: skip
        if dry_run:
            errors = open_console(stderr=True)
            with show_progress(errors, choose_mode(errors)) as progress:
                made, steps = pipeline.plan(wanted, progress)
            if not output.silent:
                show_plan(open_console(), made)
            output.present(lambda _: steps, show)
            return 0
        found = output.present(lambda progress: pipeline.release(wanted, progress), show, kind="released")
    return CHECK_FAILED if found.failed else 0


def show(console: Console, found: Released) -> None:
    """Each step, how long it took, and what came of it."""
    table = grid("step", "time", "what")
    for step in found.steps:
        table.add_row(step.name, "" if step.seconds is None else clock_text(step.seconds), plain(step.found))
    show_table(console, table)
    if found.failed:
        say(console, f"Not published, a check failed. {paragraphs(found.failed)}")


def doctor(
    folder: Annotated[Path, Parameter(name="DIR")] = Path(), /, *, output: options.Output = options.Output()
) -> int:
    """Show what this machine has, and what to fix.

    Python, torch, GPUs and driver, memory, disk, the Hub's token, engines, extras. Exit code 1 if something is broken;
    what is merely not installed is not.

    Args:
        folder: Where releases are to go: its disk is looked at.

    Examples:
        fourfold doctor
        fourfold doctor /data --json
    """
    from fourfold.doctor import examine

    found = output.present(lambda _: examine(folder), show_findings)
    return 0 if found.sound else CHECK_FAILED


def show_findings(console: Console, found: Findings) -> None:
    table = facts_table()
    for one in found.findings:
        table.add_row(plain(one.name), plain(one.found) + (f"\n-> {plain(one.fix)}" if one.fix else ""))
    show_table(console, table)
    say(console, "Nothing is broken." if found.sound else "Something is broken: see the arrows.")
