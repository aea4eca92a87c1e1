"""The serving commands on a model card."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fourfold.release.report.about import About
from fourfold.release.report.card import Serving
from fourfold.release.report.records import Records
from fourfold.serve.command import Command, Deployment, build
from fourfold.serve.engines import ENGINES, Engine, Version, version, version_text
from fourfold.serve.machine import Gpu, Machine
from fourfold.serve.served import Served, UnknownCache, open_served

GPU_COUNTS = (1, 2, 4, 8)
GPU = Gpu(name="24 GB GPU", total_bytes=24 * 2**30, free_bytes=24 * 2**30, capability=(8, 9))


def recommend(records: Records, about: About) -> list[Serving]:
    """Commands as `serve --print` gives them, for the fewest GPUs of 24 GB that suffice; the same on every machine.

    The engine that verify ran is first, in that version; other engines are in the newest version known.
    """
    try:
        served = replace(open_served(records.folder, about.name), folder=Path(about.name))
    except UnknownCache:
        return []  # the card then has no commands
    found = []
    for engine in sorted(ENGINES.values(), key=lambda engine: _verified(records, engine) is None):
        for drafts in (None, 0) if served.has_draft else (0,):
            machine, command = _fewest(served, engine, drafts, _verified(records, engine))
            drafting = command.forecast.cache.drafts
            if drafts is None and not drafting:
                continue  # `serve` leaves drafts out where they do not work
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
    """The smallest machine without a problem, or else the largest, whose command names its problems."""
    wanted = Deployment(engine=engine.name, drafts=drafts, version=at)
    for count in GPU_COUNTS:
        machine = Machine(gpus=(GPU,) * count, host_bytes=0)
        command = build(served, machine, wanted)
        if not command.problems:
            break
    return machine, command


def _verified(records: Records, engine: Engine) -> Version | None:
    """The version of this engine that verify ran."""
    said = records.verdict.engine.engine if records.verdict and records.verdict.engine else ""
    name, _, found = said.partition(" ")
    return version(found) if name == engine.title and found else None
