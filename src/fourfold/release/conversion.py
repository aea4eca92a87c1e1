"""What every conversion of a release does: OUT opened and checked, NEW written under a temporary name."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fourfold.datatypes import Event, FourfoldError, Progress
from fourfold.formats.format import EXPERT, Format
from fourfold.model.checkpoint import Checkpoint
from fourfold.model.sources import layout_problems
from fourfold.quantize.journal import FINISHED, STATE, hold
from fourfold.release.release import Release

GROUP_SIZES = (32, 64, 128)
SPARE_BYTES = 64 * 2**20  # index, config, tokenizer


@dataclass(kw_only=True)
class Job:
    """A release that is converted. release: OUT by its records, None if it is not ours."""

    out: Checkpoint
    release: Release | None
    progress: Progress
    done_bytes: int = 0

    @property
    def before(self) -> Format:
        assert self.out.format is not None
        return self.out.format

    @property
    def group_size(self) -> int:
        """Of experts, if any are quantized."""
        return (group_sizes(self.out, experts=True) or group_sizes(self.out, experts=False))[0]

    @property
    def total_bytes(self) -> int:
        return sum(header.size_bytes for header in self.out.disk.headers.values())

    @property
    def content(self) -> str:
        """Digest of OUT's shards as its fourfold.json has it, "" if it is not ours."""
        return self.release.state.output.content if self.release else ""

    def chunks(self, name: str) -> Iterator[memoryview]:
        """A tensor's bytes as they are."""
        for chunk in self.out.disk.chunks(name):
            self.tick(len(chunk))
            yield chunk

    def tick(self, count: int) -> None:
        self.done_bytes += count
        total, done = max(self.total_bytes // 10**6, 1), self.done_bytes // 10**6
        self.progress(Event(kind="stage", stage="convert", done=min(done, total), total=total, unit="MB"))


def open_job(out: Path, progress: Progress) -> Job:
    """OUT with its headers, configuration and the layout of every projection checked.

    Raises FourfoldError if it is not int4, is asymmetric or act-ordered, or has groups that the formats cannot tell.
    """
    if not out.is_dir():
        raise FourfoldError(f"{out}: no such folder; the folder of a release is wanted")
    release = Release.open(out) if (out / FINISHED).is_file() or (out / STATE).is_dir() else None
    checkpoint = Checkpoint.open(out)
    if not checkpoint.projections:
        raise FourfoldError(
            f"{out}: nothing in it is int4, so there is nothing to convert; `fourfold quantize` makes a release"
        )
    if checkpoint.format is None:
        expected = "expected int4 of GPTQ or compressed-tensors"
        raise FourfoldError(
            f"{out}: got {checkpoint.kind}, {expected}. `fourfold quantize` makes it from the BF16 model"
        )
    job = Job(out=checkpoint, release=release, progress=progress)
    _check_groups(checkpoint)
    _check_layout(job)
    return job


def group_sizes(checkpoint: Checkpoint, *, experts: bool) -> list[int]:
    """Return the group sizes of experts, or of all that is quantized beside them, in order."""
    found = checkpoint.projections.values()
    return sorted({one.group_size for one in found if bool(re.match(EXPERT, one.name)) == experts})


def _check_groups(checkpoint: Checkpoint) -> None:
    for sizes in (group_sizes(checkpoint, experts=True), group_sizes(checkpoint, experts=False)):
        if len(sizes) > 1 or not {*sizes} <= {*GROUP_SIZES}:
            found = ", ".join(map(str, sizes))
            wanted = ", ".join(map(str, GROUP_SIZES))
            raise FourfoldError(
                f"{checkpoint.folder}: its groups are of {found} inputs; engines take one size for all, {wanted}. "
                "Quantize it anew"
            )


def _check_layout(job: Job) -> None:
    """Zero points and orders of groups: small, so all are read before anything is written."""
    for projection in job.out.projections.values():
        beside = projection.parts.keys() - {job.before.codes, job.before.scales}
        tensors = {suffix: job.out.disk.read(projection.name + suffix) for suffix in beside}
        for problem in layout_problems(tensors, projection, job.before):
            raise FourfoldError(
                f"{job.out.folder}: {projection.name.rstrip('.')}: {problem}. In a symmetric format with plain "
                "groups the same codes would be other weights, so it cannot be converted; quantize it anew"
            )


@contextmanager
def under_temporary_name(new: Path, size_bytes: int) -> Iterator[Path]:
    """An empty folder beside NEW that becomes NEW when the block has ended; nothing is left of one that fails.

    Raises FourfoldError if the disk has no room for `size_bytes`.
    """
    folder = new.with_name(f".{new.name}.converting")
    if folder.is_symlink():
        raise FourfoldError(f"{folder}: got a link, expected a folder of an interrupted conversion. Remove the link")
    there = next(parent for parent in new.absolute().parents if parent.exists())
    free, wanted = shutil.disk_usage(there).free, size_bytes + SPARE_BYTES
    if free < wanted:
        raise FourfoldError(f"{new}: {wanted:,} bytes are wanted, {free:,} are free there; make room")
    with hold(folder):
        try:
            for path in folder.iterdir():  # of a conversion that was killed
                if path.name != STATE:
                    path.unlink()
            yield folder
            shutil.rmtree(folder / STATE)
            folder.rename(new)
        except OSError as error:
            raise FourfoldError(f"{new}: cannot be made of {folder} ({error.strerror})") from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)
