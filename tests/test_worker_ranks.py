"""A run in its directory, by four ranks: stopped and resumed, to the bit; who writes; who fails."""

import signal
from pathlib import Path

import pytest
import torch
import whole
from torch import nn

from normlab import checkpoint, runs, worker
from normlab.runs import RunDir

EVALS = "evals=[train:augmented,val:ema,val:precise,val:ema/decay:0.5]"
RUN = ["norm=bn", "nbs=8", "world_size=4", "epochs=3", "eval_last=2", "ema_bank=[0.5]", EVALS]


class Asked(checkpoint.Stop):
    """A signal that reaches one rank, at one of its looks; `due` as often as it is told."""

    def __init__(self, at=None, save=()):
        super().__init__()
        self.at, self.save = at, save

    def look(self, due=False):
        if self.looks + 1 == self.at:
            self.signal = signal.SIGTERM
        return super().look(due or self.looks in self.save)


class Dropping(nn.Module):
    """A network with dropout, which draws from torch's generator on each rank."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return nn.functional.dropout(self.network(x), 0.2, self.training)


def on_rank(rank, directory, at, save):
    """Train to the end, or until rank 2 is asked to stop at one of its looks."""
    torch.manual_seed(99)  # whatever the process did before
    job = whole.made(RUN, double=False)
    job.model = Dropping(job.model)
    job.optimizer = worker.build.optimizer(job.config, job.model)
    job.bank = worker.EmaBank(job.model, [0.5])
    run = RunDir(Path(directory))
    run.path.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        if rank > 0:
            patch.setattr(runs, "write_atomically", lambda *_: pytest.fail("rank 0 writes alone"))
        try:
            status = worker.work(job, run, Asked(at if rank == 2 else None, save))
        except SystemExit as end:
            return end.code
    state = checkpoint.load(run.checkpoint)
    status.pop("seconds")
    return {
        "status": status,
        "model": whole.digest(state["model"]),
        "rows": (state["history"], run.evals()),
        "rng": [whole.digest(own) for own in state["ranks"]],
    }


@pytest.fixture(scope="module")
def uninterrupted(ranks, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "run"
    return path, ranks.run(on_rank, str(path), None, ())


@pytest.mark.parametrize("at", [2, 8])
def test_a_stopped_run_ends_as_if_it_had_not_been(ranks, uninterrupted, tmp_path, at):
    """In the middle of an epoch and between evaluations; checkpoints in between, with statistics
    that the ranks have not averaged yet, change nothing. Rank 0 alone writes."""
    assert ranks.run(on_rank, str(tmp_path / "parted"), at, (1,)) == [143] * 4
    parted = ranks.run(on_rank, str(tmp_path / "parted"), None, (0, 1, 2))
    assert parted == uninterrupted[1]
    assert parted[1:] == parted[:-1]
    assert len(set(parted[0]["rng"])) == 4


def test_the_checkpoint_evaluates_to_what_was_logged(uninterrupted):
    """P29, by one process: the statistics that were evaluated are those that were saved."""
    path, _ = uninterrupted
    state = checkpoint.load(path / "checkpoint.pt")
    job = whole.made(RUN, double=False)
    job.model.load_state_dict({k.removeprefix("network."): v for k, v in state["model"].items()})
    logged = {(row["protocol"], row["epoch"]): row for row in RunDir(path).evals()}
    evaluate = worker.evaluator(job, checkpoint.Stop())
    for spec in ("val:ema", "val:precise"):
        row, found = logged[spec, "3"], evaluate.run(worker.Protocol.parse(spec))
        assert (int(row["n"]), float(row["error"])) == (found["n"], found["error"])
        assert float(row["loss"]) == pytest.approx(found["loss"], rel=1e-6)


def failing(_rank, directory):
    """Rank 0 finds no place to write to."""
    job = whole.made(RUN, double=False)
    try:
        worker.work(job, RunDir(Path(directory)), checkpoint.Stop())
    except (OSError, RuntimeError) as error:
        return type(error).__name__, str(error)


def test_what_rank_0_cannot_write_ends_all_ranks(ranks, tmp_path):
    found = ranks.run(failing, str(tmp_path / "nowhere"))
    assert found[0][0] == "FileNotFoundError"
    assert set(found[1:]) == {
        ("FirstRankFailed", "rank 0 failed in what it alone writes: its own error says why")
    }


def planned_otherwise(_rank, world_size):
    try:
        job = whole.made(["norm=bn", f"world_size={world_size}"])
        worker.work(job, RunDir(Path("nowhere")), checkpoint.Stop())
    except ValueError as error:
        return str(error)


def test_other_ranks_than_planned_are_refused(ranks):
    told = "world_size=2: this process is one of 4 ranks"
    assert ranks.run(planned_otherwise, 2) == [told] * 4
    assert planned_otherwise(0, 2) == "world_size=2: this process is one of 1 ranks"
