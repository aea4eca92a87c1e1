"""The serving commands on a model card."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fourfold.release.report.about import About
from fourfold.release.report.card import Serving
from fourfold.release.report.records import Records
from fourfold.serve.command import Deployment, smallest
from fourfold.serve.engines import ENGINES, Engine, Version, version, version_text
from fourfold.serve.machine import Machine
from fourfold.serve.served import UnknownCache, open_served

MACHINES = [Machine.of(count, 24, (8, 9)) for count in (1, 2, 4, 8)]


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
            wanted = Deployment(engine=engine.name, drafts=drafts, version=_verified(records, engine))
            machine, command = smallest(served, MACHINES, wanted)
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


def _verified(records: Records, engine: Engine) -> Version | None:
    """The version of this engine that verify ran."""
    said = records.verdict.engine.engine if records.verdict and records.verdict.engine else ""
    name, _, found = said.partition(" ")
    return version(found) if name == engine.title and found else None
