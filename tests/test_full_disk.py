"""A disk that fills while a checkpoint is written: the one before survives, and the run says so."""

import ctypes
import logging
import os
import resource
import subprocess
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path

import agents
import faults
import killable
import pytest

from normlab import checkpoint, logs


def begin(where, ranks, holder=None):
    """`normlab train`, saving after every step; its disk is the holder's, if there is one."""
    arguments = ["train", *faults.JOBS[ranks], "checkpoint_every=0", "epochs=40", "eval_last=1"]
    if holder is not None:
        return agents.start(where, command_beside, holder, arguments, rank=killable.rank)
    return agents.start(where, killable.command, arguments, rank=killable.rank)


def assert_says(where, process, reason):
    process.join(60)
    said = (where / "output.txt").read_text()
    assert process.exitcode == 1, said
    (line,) = said.splitlines()
    assert reason in line
    return line


def saved(where):
    (path,) = where.glob("runs/*/checkpoint.pt")
    assert not list(path.parent.glob(".checkpoint*"))
    return checkpoint.load(path)["position"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_limit_on_files_is_reached(tmp_path, ranks):
    process = begin(tmp_path, ranks)
    agents.wait_for(lambda: faults.steps_saved(tmp_path))
    writer = agents.pid(tmp_path, 0) if ranks == 2 else process.pid
    resource.prlimit(writer, resource.RLIMIT_FSIZE, (20_000, 20_000))
    line = assert_says(tmp_path, process, "OSError: [Errno 27] File too large")
    assert ("rank 0 of 2: " in line) == (ranks == 2)
    assert saved(tmp_path)["epoch"] < 40


@pytest.mark.parametrize("mounted", [True, False])
def test_a_full_disk(tmp_path, mounted):
    """A small disk that is full, and a file of the next checkpoint that is one by itself."""
    with small_disk(tmp_path) if mounted else nullcontext() as holder:
        seen = tmp_path if holder is None else Path(f"/proc/{holder}/root{tmp_path}")
        process = begin(tmp_path, 1, holder)
        agents.wait_for(lambda: faults.steps_saved(seen))
        if holder is None:
            let_no_checkpoint_have_room(tmp_path, process)
        else:
            fill(seen / "runs" / "filler")
        assert_says(tmp_path, process, "OSError: [Errno 28] No space left on device")
        assert saved(seen)["epoch"] < 40
        # With room again, the run goes on from there.
        before = faults.steps_saved(seen)
        (seen / "runs" / "filler").unlink(missing_ok=True)
        process = begin(tmp_path, 1, holder)
        agents.wait_for(lambda: faults.steps_saved(seen) > before)
        process.kill()
        process.join()


@contextmanager
def small_disk(where):
    """2 MB at `runs`, for the processes that join the one that is given, as long as it lives.

    Any user may mount them where the kernel gives users namespaces of their own. Where it does
    not, the test is skipped: that a file is full is another test.
    """
    (where / "runs").mkdir()
    mount = 'mount -t tmpfs -o size=2m tmpfs "$0" && echo mounted && exec cat'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount]
    with ExitStack() as opened:
        holder = None
        with suppress(FileNotFoundError):
            holder = opened.enter_context(
                subprocess.Popen(
                    [*command, str(where / "runs")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
                )
            )
        if not (holder and holder.stdout.readline()):
            pytest.skip("needs a mount: no disk may be mounted here")
        yield holder.pid


def test_where_no_disk_may_be_mounted_that_is_no_pass(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(pytest.skip.Exception, match="needs a mount"), small_disk(tmp_path):
        pass


def command_beside(holder, arguments):
    """`normlab <arguments>` in the namespaces of another process, which hold its disk."""
    here = Path.cwd()
    libc = ctypes.CDLL(None, use_errno=True)
    spaces = [os.open(f"/proc/{holder}/ns/{kind}", os.O_RDONLY) for kind in ("user", "mnt")]
    for space in spaces:
        assert libc.setns(space, 0) == 0, os.strerror(ctypes.get_errno())
    os.chdir(here)
    return killable.command(arguments)


def let_no_checkpoint_have_room(where, process):
    """Until the process has ended: the file that it writes a checkpoint to is one without room."""
    (run,) = where.glob("runs/*-*")
    while process.is_alive():
        for place in run.glob(".lease.*/*/"):
            with suppress(FileExistsError, FileNotFoundError):
                (place / f".checkpoint.pt.{process.pid}").symlink_to("/dev/full")


def test_a_log_that_cannot_be_written_says_nothing(capfd):
    with logs.logging_to(logs.LogFile(Path("/dev/full"), lambda: True)):
        logging.getLogger("normlab").warning("of no use")
    assert capfd.readouterr() == ("", "")


def fill(path: Path) -> None:
    """Take all the room there is, down to the last byte."""
    with path.open("wb", buffering=0) as file:
        for size in (4096, 1):
            try:
                while True:
                    os.write(file.fileno(), b"\0" * size)
            except OSError:
                continue
