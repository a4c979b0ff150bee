"""The lease on a run directory: of all processes that want to write in it, one at a time does.

The lease is a directory inside it, ``.lease.<number>``, and only the newest counts. It holds

- ``holder``, the file whose modification time is the heartbeat; or ``free``, once given back;
- a directory named by the holder's token, where everything that is published is first written.

Publishing is a rename from there to the final name. Whoever takes a lease over first renames the
old one away, and with it the place that an old holder's renames start from: they then fail in the
file system itself, however long that process was stopped between its last look and its rename. So
it can publish nothing, and gets LeaseLost.

A lease is taken over

- at once, when its process is dead: the kernel drops the lock on ``holder`` with the process, and
  who runs on the same kernel and sees the same mount can trust that;
- or when the heartbeat has not moved for ``EXPIRY`` seconds while somebody watched: the process is
  stopped, or on a machine that is gone.

The watcher measures with its own clock and only asks whether the file's time has changed, so no
two clocks are compared, and machines may disagree about the time of day. What is assumed of a file
system that several machines share: renaming is atomic, and opening a file shows its attributes
anew (NFS does both). A holder that is too slow loses its lease, never the run its integrity.

A child process that writes for the holder (rank 0 of a run, started by it) is handed the lease in
its environment: ``environment(directory)`` gives the variable to start it with, and ``hold`` in the
child then uses that lease, whose heart the parent goes on beating, in place of waiting for it. A
child that outlives its parent publishes until somebody takes over, and nothing from then on.
"""

import errno
import fcntl
import json
import logging
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path

log = logging.getLogger(__name__)

INTERVAL = 5.0
"""Seconds between heartbeats."""

EXPIRY = 60.0
"""Seconds without a heartbeat after which a lease is taken over from a process that may live."""

LOOK = 0.2
"""Seconds between the looks of a process that waits."""

VARIABLE = "NORMLAB_LEASE"

_HOLDER, _FREE = "holder", "free"


class LeaseLost(OSError):
    """The run directory belongs to another process now: nothing more can be written in it."""


@dataclass(frozen=True)
class _Lease:
    """A lease that this process has, or was handed."""

    place: Path
    """``<run directory>/.lease.<number>/<token>``, where files are written before they are
    published; it exists as long as the lease is ours."""
    thread: int = field(default_factory=threading.get_ident)

    @property
    def holder(self) -> Path:
        return self.place.parent / _HOLDER


_held: dict[Path, _Lease] = {}


@contextmanager
def hold(directory: Path) -> Iterator[None]:
    """Hold the lease on a directory, which is made if need be; waits while another process does.

    A process that was handed the lease uses it, and does not wait; nor does a thread that holds it
    already. Raises LeaseLost if a handed lease has been taken over by then.
    """
    key = directory.resolve()
    if key in _held and _held[key].thread == threading.get_ident():
        yield
        return
    handed = os.environ.get(VARIABLE)
    if handed and Path(handed).parent.parent == key:
        _held[key] = _Lease(Path(handed))
        try:
            check(directory)
            yield
        finally:
            del _held[key]
        return
    lease, file = _acquire(directory, key)
    ended = threading.Event()
    heart = threading.Thread(target=_beat, args=(directory, lease, ended), daemon=True)
    heart.start()
    try:
        yield
    finally:
        ended.set()
        heart.join(INTERVAL)  # no longer, should the file system hang
        # A child that still lives loses the place it publishes from, before anybody else may start.
        shutil.rmtree(lease.place, ignore_errors=True)
        with suppress(OSError):  # it may have been taken over, and the work was done before
            lease.holder.rename(lease.holder.with_name(_FREE))
        file.close()  # and the kernel's lock with it
        del _held[key]


def held(directory: Path) -> bool:
    """Whether this process may write: it holds the directory's lease, and nobody has taken it."""
    lease = _held.get(directory.resolve())
    return lease is not None and lease.place.is_dir()


def environment(directory: Path) -> dict[str, str]:
    """What to add to the environment of a child that is to write in a directory that we hold."""
    return {VARIABLE: str(_held[directory.resolve()].place)}


def check(directory: Path) -> None:
    """Raise LeaseLost for a directory that we held and another process has taken over."""
    if directory.resolve() in _held and not held(directory):
        raise LeaseLost(
            f"{directory.name} was taken over by another process, or deleted, while this one did "
            "not stir: nothing more is written here"
        )


def place(directory: Path) -> Path | None:
    """Where to write a file that is to be renamed into a directory that we hold.

    None where this process holds no lease. Raises LeaseLost where another has taken it. It may do
    so at any later moment: then the place is gone, and FileNotFoundError calls for ``check``.
    """
    check(directory)
    lease = _held.get(directory.resolve())
    return lease.place if lease else None


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there, of a directory that we may hold. Raises
    LeaseLost."""
    aside = place(path.parent)
    try:
        gone = path if aside is None else path.replace(aside / path.name)
        if gone.is_dir():
            shutil.rmtree(gone)
        else:
            gone.unlink(missing_ok=True)
    except FileNotFoundError:
        check(path.parent)


# -- taking it ------------------------------------------------------------------------------------


def _acquire(directory: Path, key: Path) -> tuple[_Lease, TextIOWrapper]:
    waiting, watch = False, _Watch()
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        newest = _newest(directory)
        if key not in _held and (newest == 0 or _is_free(_path(directory, newest), watch)):
            if taken := _take(directory, newest + 1):
                _held[key] = taken[0]
                return taken
        else:
            if not waiting:
                log.warning("%s is running in another process: waiting for it", directory.name)
            waiting = True
            time.sleep(min(LOOK, EXPIRY / 10))


def _path(directory: Path, number: int) -> Path:
    return directory / f".lease.{number}"


def _numbers(directory: Path) -> list[int]:
    """The leases there are. The newest stays when it is given back: a number is never reused."""
    names = (re.fullmatch(r"\.lease\.(\d+)", path.name) for path in directory.iterdir())
    return sorted(int(name[1]) for name in names if name)


def _newest(directory: Path) -> int:
    return max(_numbers(directory), default=0)


class _Watch:
    """For how long a heartbeat has not moved, by the clock of who watches it."""

    def __init__(self) -> None:
        self.seen: object = None
        self.since = 0.0

    def silent(self, beat: object) -> bool:
        if beat != self.seen:
            self.seen, self.since = beat, time.monotonic()
        return time.monotonic() - self.since >= EXPIRY


def _is_free(lease: Path, watch: _Watch) -> bool:
    """Whether a lease was given back, its process is dead, or its heart no longer beats."""
    if (lease / _FREE).exists():
        return True
    try:
        with (lease / _HOLDER).open("r+") as file:
            if _described(file) == _here(lease.parent) and _lock(file):
                return True  # its process is dead
            beat = os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:  # given back, or taken over, while we looked; or never whole
        beat = 0
    if watch.silent((lease, beat)):
        log.warning("%s: no heartbeat for %g s, taken over", lease.parent.name, EXPIRY)
        return True
    return False


def _described(file: TextIOWrapper) -> object:
    try:
        return json.load(file)
    except ValueError:
        return None


def _here(directory: Path) -> dict[str, object]:
    """Which kernel sees the directory through which mount: where both agree, locks are shared."""
    try:
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        kernel = secrets.token_hex()  # equal to nobody's
    return {"kernel": kernel, "device": directory.stat().st_dev}


def _lock(file: TextIOWrapper) -> bool:
    """Take the kernel's lock, which a process loses when it ends, or closes the file anywhere."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another has it; or the file system knows no locks
        return False
    return True


def _take(directory: Path, number: int) -> tuple[_Lease, TextIOWrapper] | None:
    """Make the lease of a number; None when another process was faster."""
    token = secrets.token_hex(8)
    made, file = directory / f".new.{token}", None
    try:
        (made / token).mkdir(parents=True)
        file = (made / _HOLDER).open("w")
        if _lock(file):
            json.dump(_here(directory), file)
            file.flush()
        made.rename(_path(directory, number))  # fails where that is: leases are never empty
        if _newest(directory) > number:  # the look that it came from was an old one
            raise FileExistsError(errno.EEXIST, "a newer lease")
        for older in _numbers(directory):
            if older < number:
                with suppress(FileNotFoundError):
                    _path(directory, older).rename(directory / f".gone.{older}.{token}")
        for old in [*directory.glob(".gone.*"), *directory.glob(".new.*")]:
            shutil.rmtree(old, ignore_errors=True)
        return _Lease(_path(directory.resolve(), number) / token), file
    except OSError as error:
        if file is not None:
            file.close()
        if (_path(directory, number) / token).exists():
            _path(directory, number).rename(made)
        shutil.rmtree(made, ignore_errors=True)
        # Another's lease is there; or another has tidied up, or somebody deleted the directory.
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
            return None
        raise


# -- keeping it -----------------------------------------------------------------------------------


def _beat(directory: Path, lease: _Lease, ended: threading.Event) -> None:
    """Renew the lease until it ends or is lost."""
    failing = False
    while not ended.wait(INTERVAL):
        try:
            _renew(lease)
        except OSError as error:
            if not lease.place.is_dir():
                log.warning("%s was taken over: this process publishes no more", directory.name)
                return
            if not failing:  # the lease is ours until another takes it
                log.warning("%s: its lease cannot be renewed (%s)", directory.name, error)
            failing = True
        else:
            failing = False


def _renew(lease: _Lease) -> None:
    os.utime(lease.holder)
