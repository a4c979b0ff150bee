"""A disk that fills while a checkpoint is written: the one before survives, and the run says so."""

import logging
import os
import resource
import subprocess
from pathlib import Path

import agents
import faults
import killable
import pytest

from normlab import checkpoint, logs


def begin(where, ranks):
    """`normlab train`, saving after every step, once it has saved."""
    arguments = ["train", *faults.JOBS[ranks], "checkpoint_every=0", "epochs=40", "eval_last=1"]
    process = agents.start(where, killable.command, arguments, rank=killable.rank)
    agents.wait_for(lambda: list(where.glob("runs/*/checkpoint.pt")))
    return process


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
    writer = agents.pid(tmp_path, 0) if ranks == 2 else process.pid
    resource.prlimit(writer, resource.RLIMIT_FSIZE, (20_000, 20_000))
    line = assert_says(tmp_path, process, "OSError: [Errno 27] File too large")
    assert ("rank 0 of 2: " in line) == (ranks == 2)
    assert saved(tmp_path)["epoch"] < 40


def test_a_full_disk(tmp_path):
    disk = tmp_path / "runs"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk is not allowed here")
    try:
        process = begin(tmp_path, 1)
        fill(disk / "filler")
        assert_says(tmp_path, process, "OSError: [Errno 28] No space left on device")
        assert saved(tmp_path)["epoch"] < 40
        # With room again, the run goes on from there.
        before = faults.steps_saved(tmp_path)
        (disk / "filler").unlink()
        process = begin(tmp_path, 1)
        agents.wait_for(lambda: faults.steps_saved(tmp_path) > before)
        process.kill()
        process.join()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


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
