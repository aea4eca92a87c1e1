"""One durable record per finished shard; what is left to do; whose folder OUT is."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fourfold.datatypes import Batches, FourfoldError, Method, ProjectionStatistics, ShardRecord, Target
from fourfold.model.config import CONFIG, find_family, local_folder, read_config
from fourfold.model.files import SIDECARS, check_place, unwritable, write_text
from fourfold.model.json_object import read_object
from fourfold.quantize.estimate import SWEPT
from fourfold.quantize.identity import Identity, refuse_changes

STATE = ".fourfold"
RUN = f"{STATE}/run.json"  # until the run is finished
FINISHED = "fourfold.json"  # written last: its presence says that the release is whole
REFERENCE = "reference.json"
WRITTEN = (FINISHED, "config.json", "model.safetensors.index.json", "quant_log.csv", "metrics.json", "recipe.toml",
           REFERENCE, *SIDECARS)  # fmt: skip  # by quantize, beside the shards


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes that decide the order of sums: fixed at the first start and reused on resume, whatever the machine has."""

    batches: Batches
    threads: int  # of each worker
    devices: tuple[str, ...]  # of the workers, and a CPU without BF16 instructions is named as such


def check_out(out: Path, model: Path | None) -> None:
    """Raise FourfoldError unless OUT is absent, empty, or a folder of fourfold's that no process works on.

    model: None where it is not on this disk. Touches nothing; what may have changed since is found by `hold`.
    """
    check_place(out, "OUT", model, "MODEL")
    refuse_links(out)
    ours = (out / FINISHED).exists() or (out / STATE).is_dir()
    if out.is_dir() and any(out.iterdir()) and not ours:
        raise FourfoldError(f"{out}: OUT is not empty and not an output of fourfold. Name a new or empty folder")
    _refuse_busy(out)


def _refuse_busy(out: Path) -> None:
    with suppress(OSError), (out / STATE / "lock").open("rb") as handle:  # absent, or `hold` will say
        _lock(out, handle.fileno(), fcntl.LOCK_SH)


def read_state(folder: Path) -> dict[str, Any] | None:
    """fourfold.json of a finished release, None for another maker's. Reads no other file.

    Raises FourfoldError for a release that is not finished, and for a trial.
    """
    if not folder.is_dir():
        raise FourfoldError(f"{folder}: no such folder; expected the folder of a finished release")
    if not (folder / FINISHED).is_file():
        if not (folder / STATE).is_dir():
            return None
        _refuse_busy(folder)
        raise FourfoldError(f"{folder}: not finished. Rerun the same `fourfold quantize` command to resume")
    state = read_object(folder / FINISHED)
    if state.get("partial"):
        raise FourfoldError(
            f"{folder}: partial, a trial on layers {state.get('layers')} that no engine loads. "
            "Quantize the whole model into another OUT"
        )
    return state


def check_checkpoint(model: str | Path, *, whole: bool) -> Path | None:
    """Return the folder of any checkpoint, None for a Hub ID, by what config.json and fourfold.json in it say.

    whole: a release must be finished, and of a family that fourfold knows. Raises FourfoldError.
    """
    folder = local_folder(model)
    if folder is not None:
        path = folder / CONFIG
        if whole or not path.exists():
            read_state(folder)
        raw = read_config(folder)
        if whole:
            find_family(raw, path)
    return folder


def require_release(folder: Path) -> dict[str, Any]:
    """The same of a release that must be fourfold's own."""
    state = read_state(folder)
    if state is None:
        raise FourfoldError(f"{folder}: no {FINISHED}, so no release of fourfold; expected the OUT of a finished run")
    return state


def refuse_links(out: Path) -> None:
    """Raise FourfoldError if a folder in OUT is a link, or anything in OUT/.fourfold: what is written there would land
    where the link points. Other files may be links, as in the Hub's cache: they are replaced, never written through.
    """
    for path in sorted(out.rglob("*")):
        if path.is_symlink() and (not path.is_file() or path.is_relative_to(out / STATE)):
            raise FourfoldError(
                f"{path}: got a link to {path.readlink()}, expected no link: its target is outside the release. Remove "
                f"the link, or replace it with what it points to"
            )


def _lock(out: Path, handle: int, kind: int) -> None:
    """Lock an open lock file, for as long as it is open. Raises FourfoldError if another process has it."""
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
        raise FourfoldError(f"{out}: {owner} works on this OUT right now; wait for it, or name another OUT") from None


@contextmanager
def hold(out: Path) -> Iterator[None]:
    """Hold OUT's lock. The kernel drops it with its owner, so a dead owner's lock is free. Raises FourfoldError."""
    refuse_links(out)
    state = out / STATE
    try:
        state.mkdir(parents=True, exist_ok=True)
        handle = os.open(state / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise unwritable(out, "OUT", error.strerror) from None
    try:
        _lock(out, handle, fcntl.LOCK_EX)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


class Journal:
    """The records under OUT/.fourfold of one run. Every write is durable before it counts."""

    def __init__(
        self, out: Path, identity: Identity, settings: Settings, records: Mapping[str, ShardRecord | None]
    ) -> None:
        """records: by shard; None: one that cannot be read, so that its shard counts as not finished."""
        self.out, self.identity, self.settings = out, identity, settings
        self._records = {shard: record for shard, record in records.items() if record is not None}
        self.unreadable = tuple(shard for shard, record in records.items() if record is None)

    def __contains__(self, shard: str) -> bool:
        return shard in self._records

    def __getitem__(self, shard: str) -> ShardRecord:
        return self._records[shard]

    @property
    def records(self) -> tuple[ShardRecord, ...]:
        return tuple(self._records[shard] for shard in sorted(self._records))

    def shrink(self, experts: int) -> None:
        """Chunks of experts are smaller from now on, as a device's memory was too small; codes do not change."""
        batches = dataclasses.replace(self.settings.batches, experts=experts)
        self.settings = dataclasses.replace(self.settings, batches=batches)
        _write_state(self.out, self.identity, self.settings)

    def add(self, record: ShardRecord) -> None:
        """Record a shard that is durable already."""
        write_text(_records_folder(self.out) / f"{record.shard}.json", json.dumps(dataclasses.asdict(record)))
        self._records[record.shard] = record


def close(out: Path) -> None:
    """The run is finished and its records are folded into fourfold.json: remove them. The log stays."""
    records, swept = _records_folder(out), sweep_folder(out)
    for path in [*records.glob("*"), *swept.glob("*"), out / RUN]:
        path.unlink(missing_ok=True)
    for folder in (records, swept):
        if folder.is_dir():
            folder.rmdir()


def sweep_folder(out: Path) -> Path:
    """What the sweep before the loop keeps (guide.py)."""
    return out / SWEPT


def _records_folder(out: Path) -> Path:
    return out / STATE / "shards"


def open_journal(out: Path, identity: Identity, settings: Settings) -> Journal:
    """The journal of a new run, or of the one that was interrupted here, with the settings of its first start.

    Raises FourfoldError if recipe, source, calibration, held-out text or layers are not those of the first start.
    """
    path = out / RUN
    _records_folder(out).mkdir(exist_ok=True)
    if not path.exists():
        _write_state(out, identity, settings)
        return Journal(out, identity, settings, {})
    with _readable(path):
        state = json.loads(path.read_text(encoding="utf-8"))
        batches = Batches(**state["settings"]["batches"])
        before, settings = (
            Identity(**state["identity"]),
            Settings(batches, state["settings"]["threads"], tuple(state["settings"]["devices"])),
        )
    refuse_changes(out, identity, before)
    records = {path.stem: _read_record(path) for path in sorted(_records_folder(out).glob("*.json"))}
    return Journal(out, identity, settings, records)


def _write_state(out: Path, identity: Identity, settings: Settings) -> None:
    state = {"identity": dataclasses.asdict(identity), "settings": dataclasses.asdict(settings)}
    write_text(out / RUN, json.dumps(state, indent=1))


def _read_record(path: Path) -> ShardRecord | None:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        rows = tuple(
            ProjectionStatistics(**{**row, "method": Method(row["method"]), "target": Target(row["target"])})
            for row in raw.pop("projections")
        )
        return ShardRecord(**raw, projections=rows)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def finished_identity(out: Path) -> Identity | None:
    """The identity of the finished release in OUT, or None if OUT holds none."""
    return _read_identity(out / FINISHED)


def started_identity(out: Path) -> Identity | None:
    """The identity of the run in OUT, finished or not, or None if OUT holds none."""
    return finished_identity(out) or _read_identity(out / RUN)


def _read_identity(path: Path) -> Identity | None:
    if not path.exists():
        return None
    with _readable(path):
        return Identity(**json.loads(path.read_text(encoding="utf-8"))["identity"])


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FourfoldError(f"{path}: cannot be read ({error}). Start over with --restart") from None


def log(out: Path, text: str) -> None:
    """Append a dated line to OUT/.fourfold/run.log.

    A log that cannot be written stops nothing: a full disk is reported by what must be written.
    """
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    with suppress(OSError), (out / STATE / "run.log").open("a", encoding="utf-8") as handle:
        handle.write(f"{stamp} {text}\n")


def clear(out: Path) -> None:
    """Remove what fourfold wrote into OUT, and nothing else."""
    written = [*out.glob("model-?????-of-?????.safetensors"), *(out / name for name in WRITTEN), *out.glob(".*.tmp")]
    written += [*_records_folder(out).glob("*"), *sweep_folder(out).glob("*")]
    written += [*(out / STATE).glob(".*.tmp"), out / RUN]
    for path in written:
        path.unlink(missing_ok=True)
