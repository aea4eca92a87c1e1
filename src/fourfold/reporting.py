"""The command `report` and its options."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fourfold import terminal
from fourfold.datatypes import FourfoldError
from fourfold.install import pip_install
from fourfold.options import EXIT_CODES, Quiet, Release, answer

if TYPE_CHECKING:
    from fourfold.release.report.about import About
    from fourfold.release.report.card import Serving
    from fourfold.release.report.records import Records
    from fourfold.serve.command import Command
    from fourfold.serve.engines import Engine, Version
    from fourfold.serve.machine import Machine
    from fourfold.serve.served import Served

LIBRARIES = ("vl_convert",)  # of the extra `report`
CARD_GPUS, CARD_GPU_BYTES, CARD_CAPABILITY = (1, 2, 4, 8), 24 * 2**30, (8, 9)  # what commands on a card are for
REPORT_EXAMPLES = f"""\b
Examples:
  fourfold report ./release --repo me/Qwen3.6-35B-A3B-int4 --base-model Qwen/Qwen3.6-35B-A3B
  fourfold report ./release --against ./other

{EXIT_CODES}"""

Repo = Annotated[
    str | None,
    typer.Option(
        metavar="ORG/NAME",
        show_default=False,
        help="The repository that it will be published as, for commands on the card. Default: the folder's name.",
    ),
]
BaseModel = Annotated[
    str | None,
    typer.Option(
        metavar="ORG/NAME",
        show_default=False,
        help="The Hub's name of the checkpoint it was made of. Default: as quantize was given it, if by that name.",
    ),
]
LicenceName = Annotated[
    str | None,
    typer.Option(
        "--license",
        metavar="NAME",
        show_default=False,
        help="The Hub's name of the licence. Default: as the source's card or LICENSE file has it.",
    ),
]
Beside = Annotated[
    Path | None,
    typer.Option(
        "--against", metavar="OUT2", show_default=False, help="A second release of ours, shown beside this one."
    ),
]


def report(
    out: Release,
    against: Beside = None,
    repo: Repo = None,
    base_model: BaseModel = None,
    license: LicenceName = None,
    quiet: Quiet = False,
) -> None:
    """Write a release's model card, its plots and report.html.

    Reads only what quantize, evaluate, verify and bench left in OUT (bench.json if it is there); measures nothing. What
    is not there is named as not measured. Of what `convert` wrote as GGUF or for MLX, the card alone is written.
    """
    with answer():
        from fourfold.model.config import read_config
        from fourfold.model.hub import check_repo_id
        from fourfold.quantize.journal import require_release
        from fourfold.release.contents import CARD, FIGURES, PAGE, read_export

        record = read_export(out)
        if record is not None and against:
            raise FourfoldError(f"--against: got {against}, expected no such option for what convert wrote")
        for folder in filter(None, (out, against) if record is None else ()):
            require_release(folder)
            read_config(folder)
        if repo is not None:
            check_repo_id("--repo", repo)
        if record is None and (missing := [name for name in LIBRARIES if find_spec(name) is None]):
            raise FourfoldError(f"report needs {' and '.join(missing)}. Try: {pip_install('report')}")

        from fourfold.release.report.about import About

        about = About(name=repo or out.resolve().name, base_model=base_model, licence=license)
        if record is not None:
            from fourfold.release.report.export_card import write as write_card

            write_card(out, record, about)
            if not quiet:
                terminal.say(terminal.open_console(), f"{terminal.plain(out / CARD)}: model card")
            return

        from fourfold.release.report.write import write

        records = write(out, about, recommend, against)
        if quiet:
            return
        console = terminal.open_console()
        for name, what in ((CARD, "model card"), (FIGURES, "its plots"), (PAGE, "every projection, for a browser")):
            terminal.say(console, f"{terminal.plain(out / name)}: {what}")
        for what, way in records.missing:
            terminal.say(console, f"not measured: {what} ({way})")


def recommend(records: Records, about: About) -> list[Serving]:
    """Commands as `serve --print` gives them, for the fewest GPUs of 24 GB that will do: the same wherever this runs.

    For the version of the engine that verify ran, or else the newest that is known.
    """
    from fourfold.release.report.card import Serving
    from fourfold.serve.engines import ENGINES, version_text
    from fourfold.serve.served import UnknownCache, open_served

    try:
        served = replace(open_served(records.release.folder, about.name), folder=Path(about.name))
    except UnknownCache:
        return []  # the card then has none
    found = []
    for engine in ENGINES.values():
        for drafts in (None, 0) if served.has_draft else (0,):
            machine, command = _fewest(served, engine, drafts, _verified(records, engine))
            drafting = command.forecast.cache.drafts
            if drafts is None and not drafting:
                continue  # where drafts do not work, `serve` leaves them out by itself
            found.append(
                Serving(
                    title=f"{engine.title} {version_text(command.version)}, {drafting or 'no'} draft tokens",
                    text=command.text(),
                    machine=machine.describe(),
                    problems=command.problems,
                    notes=(*command.forecast.lines(), *command.notes),
                )
            )
    return found


def _fewest(served: Served, engine: Engine, drafts: int | None, at: Version | None) -> tuple[Machine, Command]:
    """The first of the card's machines that has no problem, or else the last, with what its problems are."""
    from fourfold.serve.command import Deployment, build
    from fourfold.serve.machine import Gpu, Machine

    gpu = Gpu(name="24 GB GPU", total_bytes=CARD_GPU_BYTES, free_bytes=CARD_GPU_BYTES, capability=CARD_CAPABILITY)
    wanted = Deployment(engine=engine.name, drafts=drafts, version=at)
    for count in CARD_GPUS:
        machine = Machine(gpus=(gpu,) * count, host_bytes=0)
        command = build(served, machine, wanted)
        if not command.problems:
            break
    return machine, command


def _verified(records: Records, engine: Engine) -> Version | None:
    """The version that verify ran, of this engine."""
    from fourfold.serve.engines import version

    said = str(((records.verdict or {}).get("engine") or {}).get("engine", ""))
    name, _, found = said.partition(" ")
    return version(found) if name == engine.title and found else None
