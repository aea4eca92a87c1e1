"""A child process with a time limit that leaves nothing behind: no process, no shared memory, no temporary file."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

POLL_SECONDS, LOOK_SECONDS = 0.1, 1.0  # whether it has ended; who is there (which reads all of /proc)
GRACE_SECONDS = 5.0  # between SIGTERM and SIGKILL
SHARED_MEMORY = Path("/dev/shm")
SCRATCH = Path("/tmp")  # not TMPDIR: sockets are made there, and their paths may have no more than 107 characters
TAIL_LINES = 15
ENDING = (signal.SIGINT, signal.SIGTERM)


def run(command: Sequence[str], log: Path, limit_seconds: float, environment: Mapping[str, str]) -> Child:
    """Run a command until it ends, or end it with everything it started. Arguments as of `start`."""
    with start(command, log, environment) as child:
        child.timed_out = not child.wait(limit_seconds)
    return child


@contextmanager
def start(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Iterator[Child]:
    """Start a command in a session of its own; the end of the block ends it and all its descendants.

    log: receives its stdout and stderr. environment: in addition to ours; TMPDIR and the XDG folders are a fresh folder
    that is removed. Files in /dev/shm that only descendants had mapped are unlinked.
    """
    scratch = Path(tempfile.mkdtemp(prefix="fourfold-", dir=SCRATCH))
    folders = {name: str(scratch) for name in ("TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")}
    try:
        with log.open("wb") as output:
            child: Child | None = None
            try:
                with _undisturbed():
                    process = subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                        env={**os.environ, **folders, **environment}, start_new_session=True,
                    )  # fmt: skip
                    child = Child(process, log)
                yield child
            finally:
                if child is not None:
                    with _undisturbed():
                        child.end()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Delay signals that would end this process until the block is done."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals go to the main thread
        return
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


class Child:
    """A process in a session of its own, and all that it started. log: its stdout and stderr, kept."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.log, self.timed_out = log, False
        self._process, self._family, self._began = process, _Family(process.pid), time.monotonic()
        self._looked = 0.0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def running(self) -> bool:
        """Return whether it has not ended. Call it regularly: it records the descendants, too."""
        if self._process.poll() is not None:
            return False
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self._family.look()
            self._looked = time.monotonic()
        return True

    def wait(self, limit_seconds: float) -> bool:
        """Wait for its end. Returns whether it came before the limit."""
        deadline = time.monotonic() + limit_seconds
        while self.running():
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def signal(self, number: int) -> None:
        """Send a signal to the process alone, which passes it on."""
        if self._process.poll() is None:
            self._family.look()  # its descendants cannot be found once it has ended
            self._process.send_signal(number)

    def end(self) -> None:
        """End it with everything it started."""
        self._family.end()
        self._process.wait()

    @property
    def ok(self) -> bool:
        return self._process.returncode == 0 and not self.timed_out

    def why(self, limit_seconds: float) -> str:
        """Return what went wrong, once it has ended, with the log's first error and last lines."""
        code = self._process.returncode
        if self.timed_out:
            failure = f"no answer within {limit_seconds:,.0f} s: ended with all its processes"
        else:
            how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            failure = f"{how} after {self.seconds:,.0f} s"
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        # An engine's last line often says only that it failed; the first error says why.
        first = next((line.strip() for line in lines if "Error:" in line and " WARNING " not in line), "")
        tail = lines[-TAIL_LINES:]
        head = [f"first error: {first}"] if first and first not in (line.strip() for line in tail) else []
        return "\n".join([failure, *head, f"last lines of {self.log}:", *(f"  {line}" for line in tail)])


class _Family:
    """A child and all its descendants, also those that began a session of their own or lost their parent."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._members: set[psutil.Process] = {self._root}
        self._shared: set[Path] = set()

    def look(self) -> None:
        """Take note of who is there, and of the shared memory that they hold."""
        for member in list(self._members):
            try:
                self._members.update(member.children(recursive=True))
                self._shared |= _shared_memory(member.pid)
            except psutil.Error:
                continue  # has ended; its children were noted before, or are in its session

    def end(self) -> None:
        """SIGTERM, a while to tidy up, SIGKILL; then unlink shared memory that nobody holds any more."""
        self._look_at_session()
        alive = [member for member in self._members if member.is_running()]
        for member in alive:
            _signal(member, signal.SIGTERM)
        _, stubborn = psutil.wait_procs(alive, timeout=GRACE_SECONDS)
        self._look_at_session()
        for member in {*stubborn, *filter(psutil.Process.is_running, self._members)}:
            _signal(member, signal.SIGKILL)
        psutil.wait_procs(list(self._members), timeout=GRACE_SECONDS)
        remaining = {path for path in self._shared if path.exists()}
        if remaining:
            held = {path for process in psutil.process_iter() for path in _shared_memory(process.pid)}
            for path in remaining - held:
                path.unlink(missing_ok=True)

    def _look_at_session(self) -> None:
        """Orphans belong to init, but still to the session that the child began."""
        self.look()
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self._root.pid:
                    self._members.add(process)
            except (ProcessLookupError, PermissionError):
                continue
        self.look()


def _signal(process: psutil.Process, number: int) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)  # psutil makes sure that the pid is still the same process


def _shared_memory(pid: int) -> set[Path]:
    """Files under /dev/shm that a process has mapped or open."""
    found: set[str] = set()
    with suppress(OSError):  # ended, or another user's
        for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
            if str(SHARED_MEMORY) in line:
                found.add(line[line.index(str(SHARED_MEMORY)) :])
        found.update(map(os.readlink, Path(f"/proc/{pid}/fd").iterdir()))
    return {Path(name) for name in found if name.startswith(f"{SHARED_MEMORY}/") and not name.endswith(" (deleted)")}
