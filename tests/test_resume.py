"""Real processes, killed with SIGKILL: the resumed run ends bit for bit where it would have.

Three kills, one in each phase, run always; twenty at moments uniform over the run's wall time are
slow. Every row of the slow test's output says in which phase its kill fell.
"""

import csv
import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import killable
import pytest
import torch
from forked import CONTEXT

BATCH = 32
ARGUMENTS = [
    "train", "norm=ghost", "nbs=8", f"batch_size={BATCH}", "scale=demo",
    "ema_bank=[0.5]", "threads=1", "device=cpu", "probes=[ema_trace]",
    "evals=[train:augmented,train:batch,val:batch,val:ema,val:ema/decay:0.5,val:precise,"
    "test:precise/batch:2,test:precise_mean]",
]  # fmt: skip
PHASES = ("epoch", "checkpoint", "evaluate")


@dataclass(frozen=True)
class Length:
    """How much there is to do, and how many seconds lie between checkpoints."""

    epochs: int
    eval_last: int
    checkpoint_every: float

    def arguments(self) -> list[str]:
        return [f"{name}={value}" for name, value in vars(self).items()]


SHORT = Length(epochs=4, eval_last=2, checkpoint_every=0)
# Training and evaluating outlast the start of a run, so that kills fall there too.
LONG = Length(epochs=24, eval_last=16, checkpoint_every=0)


def start(where: Path, length: Length) -> BaseProcess:
    where.mkdir(exist_ok=True)
    arguments = where, [*ARGUMENTS, *length.arguments()], dict(os.environ)
    process = CONTEXT.Process(target=killable.main, args=arguments, daemon=True)
    process.start()
    return process


def finish(where: Path, length: Length) -> float:
    """Run to the end; returns the seconds it took."""
    began = time.monotonic()
    process = start(where, length)
    process.join(180)
    assert process.exitcode == 0, (where / "output.txt").read_text()
    return time.monotonic() - began


def phase(where: Path) -> str:
    try:
        return (where / "phase").read_text() or "start"
    except FileNotFoundError:
        return "start"


def run_directory(where: Path) -> Path | None:
    found = list((where / "runs").glob("*-*")) if (where / "runs").exists() else []
    return found[0] if found else None


def position(where: Path) -> int:
    """Optimizer steps that the last checkpoint holds, 0 without one."""
    run = run_directory(where)
    if run is None or not (run / "checkpoint.pt").exists():
        return 0
    at = torch.load(run / "checkpoint.pt", weights_only=True)["position"]
    return int(at["epoch"]) * steps_per_epoch() + int(at["step"])


def steps_per_epoch() -> int:
    from normlab import data

    return data.find("digits")("data", seed=0).size("train") // BATCH


def assert_identical(run: Path, reference: Path) -> None:
    for name in ("metrics.csv", "evals.csv", "probes.csv"):
        assert (run / name).read_bytes() == (reference / name).read_bytes(), name
    ours, theirs = (
        torch.load(path / "checkpoint.pt", weights_only=True) for path in (run, reference)
    )
    assert ours["position"] == theirs["position"]
    assert ours["history"] == theirs["history"]
    for key in ("model", "ema_bank", "optimizer"):
        assert_same(ours[key], theirs[key], key)


def assert_same(ours: object, theirs: object, where: str) -> None:
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, list):
        for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(a, b, f"{where}[{number}]")
    else:
        assert ours == theirs, where


def assert_resumes(where: Path, reference: Path, length: Length) -> None:
    """Start again after a kill: only the missing steps are made, and the end is the same."""
    done = position(where)
    finish(where, length)
    made = int((where / "phase.steps").read_text())
    assert made == length.epochs * steps_per_epoch() - done
    run = run_directory(where)
    assert run is not None
    assert run.name == reference.name
    assert_identical(run, reference)


def uninterrupted(where: Path, length: Length) -> tuple[Path, float]:
    """A run without a kill, and its wall time."""
    seconds = finish(where, length)
    run = run_directory(where)
    assert run is not None
    with (run / "evals.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == length.eval_last * 8
    return run, seconds


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    return uninterrupted(tmp_path_factory.mktemp("reference"), SHORT)[0]


@pytest.mark.parametrize("wanted", PHASES)
def test_a_kill_in_each_phase(tmp_path, reference, wanted):
    process = start(tmp_path, SHORT)
    while phase(tmp_path) != wanted or not list(tmp_path.glob("runs/*/checkpoint.pt")):
        assert process.is_alive(), "ended before it could be killed"
        time.sleep(0.0005)
    process.kill()
    process.join()
    assert run_directory(tmp_path) is not None
    assert not (run_directory(tmp_path) / "status.json").exists()
    assert_resumes(tmp_path, reference, SHORT)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends(tmp_path, reference, number, code):
    process = start(tmp_path, SHORT)
    while phase(tmp_path) != "epoch":
        assert process.is_alive()
        time.sleep(0.0005)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == code
    assert position(tmp_path) > 0
    assert_resumes(tmp_path, reference, SHORT)


@pytest.mark.slow
def test_twenty_kills_uniform_over_the_wall_time(tmp_path, capsys):
    """Kills that come after the end do not count."""
    run, seconds = uninterrupted(tmp_path / "reference", LONG)
    rng = random.Random(20)
    quota = {"epoch": 5, "checkpoint": 2, "evaluate": 2}
    fell: Counter[str] = Counter()
    tries = 0
    while fell.total() < 20 or any(fell[name] < least for name, least in quota.items()):
        assert tries < 120, f"the phases cannot be hit: {fell}"
        where = tmp_path / str(tries)
        process = start(where, LONG)
        moment = rng.uniform(0, seconds)
        time.sleep(moment)
        alive = process.is_alive()
        process.kill()
        process.join()
        tries += 1
        if alive:
            fell[phase(where)] += 1
            with capsys.disabled():  # the rows are the record of this test
                print(
                    f"\nkill {fell.total()}: at {moment:.2f} of {seconds:.2f} s, "
                    f"in {phase(where)}, {position(where)} steps saved",
                    end="",
                )
        assert_resumes(where, run, LONG)
    with capsys.disabled():
        print(f"\n{dict(fell)}")
