"""Runs that are killed again and again, and what became of them.

A fault kills a process, or all of a run's, with SIGKILL, at a random moment of a phase of the run.
The run is then started again, and may be killed again; its end is compared, bit for bit, with that
of a run that nothing happened to.
"""

import csv
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import agents
import killable
import torch

from normlab import config, runs

PHASES = ("epoch", "checkpoint", "evaluate")
VICTIMS = {1: ("process",), 2: ("rank 0", "rank 1", "agent", "group")}

EVALS = "[train:augmented,train:batch,val:batch,val:ema,val:ema/decay:0.5,val:precise]"
COMMON = [
    "model=tiny", "data=synthetic", "data.n=640", "batch_size=32", "scale=demo", "epochs=5",
    "eval_last=3", "ema_bank=[0.5]", "threads=1", "device=cpu", "checkpoint_every=0.1",
    f"evals={EVALS}",
]  # fmt: skip
JOBS = {
    # Each rank has running statistics of its own, which a checkpoint must keep apart.
    2: [*COMMON, "norm=bn", "nbs=16", "world_size=2"],
    1: [*COMMON, "norm=ghost", "nbs=8"],
}


@dataclass(frozen=True)
class Fault:
    """What is to happen."""

    ranks: int
    victim: str
    phase: str


@dataclass(frozen=True)
class Row:
    """What has happened."""

    run: int
    """Faults of one run follow each other."""
    ranks: int
    victim: str
    phase: str
    """That the first rank was in when it, or another process, was killed."""
    seconds: float
    """Since the start."""
    steps: int
    """Optimizer steps that the checkpoint held."""
    code: int
    """Exit code of the process that started the ranks."""
    identical: bool = False
    """In the end, to the run without faults: weights, optimizer, metrics, evaluations."""


class Endurance:
    """Runs under faults, in the directory `where`."""

    def __init__(self, where: Path, seed: int) -> None:
        self.where, self.rng = where, random.Random(seed)
        self.runs = 0
        self.references: dict[int, Path] = {}

    def reference(self, ranks: int) -> Path:
        """The run without faults."""
        if ranks not in self.references:
            where = self.where / f"reference-{ranks}"
            process = self._start(where, ranks)
            assert _joined(process) == 0, _output(where)
            self.references[ranks] = _run(where)
        return self.references[ranks]

    def run(self, faults: list[Fault]) -> tuple[list[Row], list[Fault]]:
        """One run, hit by faults one after the other; returns also those for which it was too
        short."""
        reference = self.reference(faults[0].ranks)
        where = self.where / str(self.runs)
        self.runs += 1
        rows: list[Row] = []
        for fault in faults:
            if (row := self.hit(where, fault)) is None:
                break
            rows.append(row)
        if not _done(where):
            # To the end, by the steps that are missing and no others.
            done = steps_saved(where)
            assert _joined(self._start(where, faults[0].ranks)) == 0, _output(where)
            made = int((where / "phase.steps").read_text())
            assert made == _steps(reference) - done, "other steps than the missing ones"
        same = identical(_run(where), reference)
        return [replace(row, identical=same) for row in rows], faults[len(rows) :]

    def _start(self, where: Path, ranks: int, *more: str) -> BaseProcess:
        # Until the new processes have told theirs, phase and pids would be those of the start
        # before: a fault would fall at once, under a false name.
        for told in (where / "phase", *where.glob("pid-*")):
            told.unlink(missing_ok=True)
        composed = config.compose([*JOBS[ranks], "skip_done=local", *more])
        return agents.start(where, _train, composed, rank=killable.rank)

    def hit(self, where: Path, fault: Fault, *more: str) -> Row | None:
        """Start the run and kill; None if it has ended before that. more: of its config."""
        process = self._start(where, fault.ranks, *more)
        began = time.monotonic()
        # The n-th time that the run is in the phase, a little after it has begun.
        entries = self.rng.randint(1, 3 if fault.phase == "evaluate" else 10)
        within = self.rng.uniform(0, 0.1 if fault.phase == "epoch" else 0.01)
        before = ""
        while True:
            now = phase(where)
            entries -= now == fault.phase != before
            before = now
            if not process.is_alive():
                assert _joined(process) == 0, _output(where)
                return None
            if entries <= 0 and now == fault.phase:
                time.sleep(within)
                # Held still, it is in the phase that it tells.
                with _stopped(self._first(where, fault, process)):
                    if fell := phase(where) == fault.phase:
                        for pid in self._victims(where, fault, process):
                            _signal(pid, signal.SIGKILL)
                if fell:
                    break
                within /= 2
            time.sleep(0.0005)
        seconds = time.monotonic() - began
        code = _joined(process)
        if _done(where) and not more:  # the kill came after the end
            return None
        return Row(self.runs - 1, fault.ranks, fault.victim, fault.phase, round(seconds, 2),
                   steps_saved(where), code)  # fmt: skip

    def _first(self, where: Path, fault: Fault, process: BaseProcess) -> int:
        """The process that tells the phase."""
        assert process.pid is not None
        return agents.pid(where, 0) if fault.ranks == 2 else process.pid

    def _victims(self, where: Path, fault: Fault, process: BaseProcess) -> list[int]:
        assert process.pid is not None
        ranks = [agents.pid(where, rank) for rank in (0, 1)] if fault.ranks == 2 else []
        everyone = [*ranks, process.pid]
        return {
            "process": everyone, "agent": [process.pid], "group": everyone,
            "rank 0": ranks[:1], "rank 1": ranks[1:],
        }[fault.victim]  # fmt: skip


def _train(composed: dict[str, Any]) -> int:
    """What `normlab train` does with a composed config: the exit code."""
    from normlab import launch

    Path("phase").write_text("start")
    Path("phase.steps").unlink(missing_ok=True)
    try:
        if composed["world_size"] > 1:
            launch.run(composed)
        else:
            with killable.phases(Path("phase")):
                launch.run(composed)
    except launch.JobError as error:
        print(error, flush=True)
        return 1
    return 0


@contextmanager
def _stopped(pid: int) -> Iterator[None]:
    """Within, a process stands still, unless it has ended: what it tells is where it is."""
    _signal(pid, signal.SIGSTOP)
    agents.wait_for(lambda: agents.stopped(pid) or agents.gone(pid))
    try:
        yield
    finally:
        _signal(pid, signal.SIGCONT)


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _joined(process: BaseProcess) -> int:
    process.join(180)
    assert process.exitcode is not None, "it does not end"
    return process.exitcode


def _output(where: Path) -> str:
    return (where / "output.txt").read_text()


def phase(where: Path) -> str:
    try:
        return (where / "phase").read_text() or "start"
    except FileNotFoundError:
        return "start"


def _run(where: Path) -> Path:
    (run,) = (where / "runs").glob("*-*")
    return run


def _done(where: Path) -> bool:
    return runs.RunDir(_run(where)).status().get("status") == "done"


def _steps(run: Path) -> int:
    """Optimizer steps that a run's checkpoint holds."""
    at = torch.load(run / "checkpoint.pt", weights_only=True)["position"]
    return int(at["epoch"]) * (640 // 32) + int(at["step"])


def steps_saved(where: Path) -> int:
    """Of the run in a directory, 0 without a checkpoint."""
    return _steps(_run(where)) if list(where.glob("runs/*/checkpoint.pt")) else 0


def identical(run: Path, reference: Path) -> bool:
    """Whether two runs have ended alike, bit for bit, in all but the time they took."""
    tables = all(
        (run / name).read_bytes() == (reference / name).read_bytes()
        for name in ("metrics.csv", "evals.csv")
    )
    ours, theirs = (
        torch.load(path / "checkpoint.pt", weights_only=True) for path in (run, reference)
    )
    parts = ("model", "optimizer", "ema_bank", "position", "history", "ranks", "rng")
    return tables and all(_same(ours[part], theirs[part]) for part in parts)


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(_same(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))
    return bool(ours == theirs)


# -- the report -----------------------------------------------------------------------------------


def write(rows: Sequence[Row], out: Path) -> None:
    """Write faults.csv, a row per fault, and faults.md, which counts them."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "faults.csv").open("w", newline="") as file:
        names = ["number", *(field.name for field in fields(Row))]
        table = csv.DictWriter(file, names, lineterminator="\n")
        table.writeheader()
        for number, row in enumerate(rows, start=1):
            table.writerow({"number": number} | asdict(row))
    (out / "faults.md").write_text(_page(rows))


def _page(rows: Sequence[Row]) -> str:
    phases = sorted({row.phase for row in rows})
    victims = [(ranks, victim) for ranks in sorted(VICTIMS, reverse=True)
               for victim in VICTIMS[ranks]]  # fmt: skip
    count = Counter((row.ranks, row.victim, row.phase) for row in rows)
    ends = {row.run: row.identical for row in rows}
    same = sum(row.identical for row in rows)
    commit, dirty = runs.commit()
    lines = [
        "# Runs that were killed",
        "",
        f"{len(rows)} faults in {len(ends)} runs: processes killed with SIGKILL at random moments,",
        "and the run started again each time, which may be killed again. In the end "
        f"{sum(ends.values())} of the",
        f"{len(ends)} runs, with {same} of the {len(rows)} faults, had the weights, optimizer,",
        "generators, metrics and evaluations of a run without faults, bit for bit.",
        "",
        "| ranks | killed | " + " | ".join(phases) + " |",
        "|---:|---|" + "---:|" * len(phases),
    ]
    for ranks, victim in victims:
        cells = [str(count[ranks, victim, phase]) for phase in phases]
        lines.append(f"| {ranks} | {victim} | {' | '.join(cells)} |")
    lines += [
        "",
        "The phase is the one that the first rank was in at the moment of the kill; it was stopped",
        "for that moment to make sure. `faults.csv` has a row per fault: what",
        "was killed, in which phase, how many seconds after the start, how many of the run's",
        "optimizer steps its checkpoint held, the exit code of the process that starts the ranks,",
        "and whether the run ended as the undisturbed one.",
        "",
        f"CPU, torch {torch.__version__}, commit {commit}{' (changed)' if dirty else ''}. Again:",
        "",
        "    NORMLAB_FAULTS=results/faults python -m pytest -m slow tests/test_faults.py",
        "",
    ]
    return "\n".join(lines)
