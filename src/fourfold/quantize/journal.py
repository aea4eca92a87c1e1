"""One durable record per finished shard; what is left to do; whose folder OUT is."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from msgspec import structs

from fourfold.datatypes import FourfoldError, ShardRecord
from fourfold.model.config import CONFIG, find_family, local_folder, read_config
from fourfold.model.files import SIDECARS, check_place, unwritable
from fourfold.quantize.estimate import SWEPT
from fourfold.quantize.identity import refuse_changes
from fourfold.records.record import read_entry, write_entry
from fourfold.records.release import Identity, Run, Settings, State

STATE = ".fourfold"
RUN = f"{STATE}/run.json"  # until the run is finished
FINISHED = "fourfold.json"  # written last: its presence says that the release is whole
RECIPE, REFERENCE, LOG, METRICS = "recipe.toml", "reference.json", "quant_log.csv", "metrics.json"
WRITTEN = (FINISHED, "config.json", "model.safetensors.index.json", LOG, METRICS, RECIPE, REFERENCE,
           *SIDECARS)  # fmt: skip  # by quantize, beside the shards


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


def read_state(folder: Path) -> State | None:
    """fourfold.json of a finished release, None for another maker's. Reads no other file.

    Raises FourfoldError for a release that is not finished, for a trial, and for a file that quantize did not write.
    """
    if not folder.is_dir():
        raise FourfoldError(f"{folder}: no such folder; expected the folder of a finished release")
    if not (folder / FINISHED).is_file():
        if not (folder / STATE).is_dir():
            return None
        _refuse_busy(folder)
        raise FourfoldError(f"{folder}: not finished. Rerun the same `fourfold quantize` command to resume")
    state = State.read(folder / FINISHED)
    if state.partial:
        raise FourfoldError(
            f"{folder}: partial, a trial on layers {state.layers} that no engine loads. "
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


def require_release(folder: Path) -> State:
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
        self.settings = structs.replace(self.settings, batches=batches)
        Run(identity=self.identity, settings=self.settings).write(self.out / RUN)

    def add(self, record: ShardRecord) -> None:
        """Record a shard that is durable already."""
        write_entry(_records_folder(self.out) / f"{record.shard}.json", record)
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
    before = Run.find(path)
    if before is None:
        Run(identity=identity, settings=settings).write(path)
        return Journal(out, identity, settings, {})
    refuse_changes(out, identity, before.identity)
    entries = sorted(_records_folder(out).glob("*.json"))
    return Journal(out, identity, before.settings, {path.stem: read_entry(path, ShardRecord) for path in entries})


def started_identity(out: Path) -> Identity | None:
    """The identity of the run in OUT, finished or not, or None if OUT holds none."""
    started = State.find(out / FINISHED) or Run.find(out / RUN)
    return started.identity if started else None


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
