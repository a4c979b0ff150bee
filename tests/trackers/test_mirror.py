"""What trackers are told of a run: all that its files say, once; and whatever becomes of them, the
run goes on as if they were not there."""

from contextlib import suppress
from dataclasses import dataclass, field

import pytest
import torch

from normlab import config, launch, runs, trackers, worker
from normlab.trackers import mirror

QUICK = ["scale=demo", "norm=ghost", "nbs=8", "batch_size=64", "epochs=3", "device=cpu",
         "threads=1", "allocator=system", "evals=[val:ema,val:precise/samples:64]", "eval_at=[1]",
         "data.subset=130"]  # fmt: skip

pytestmark = pytest.mark.usefixtures("elsewhere")


@dataclass
class Recorder:
    """A tracker that remembers."""

    durable = True  # of all of them, and no field
    told: list = field(default_factory=list)
    ended: list = field(default_factory=list)

    def log(self, values, epoch):
        self.told += [(tag, epoch, value) for tag, value in values.items()]

    def end(self, status):
        self.ended.append(status)


@pytest.fixture
def starts(monkeypatch):
    """What each start of a run makes of the tracker `recorder`, which is there for a test."""
    made = []
    offer(monkeypatch, lambda *_: made.append(Recorder()) or made[-1])
    return made


def offer(monkeypatch, start):
    monkeypatch.setattr(trackers, "names", lambda: ["recorder"])
    monkeypatch.setattr(trackers, "find", lambda _: start)
    monkeypatch.setattr(trackers, "beside", lambda *_: "left")


def run(*overrides):
    return launch.run(config.compose([*QUICK, *overrides]))


def weights(outcome):
    return torch.load(outcome.path / "checkpoint.pt", weights_only=True)["model"]


def said(path):
    """(tag, epoch, number) of every number in a run's files, spelled here once more."""
    found = set()
    for row in runs.RunDir(path).metrics():
        columns = {"error/train": "train_error", "loss/train": "train_loss", "lr": "lr"}
        found |= {(tag, int(row["epoch"]), float(row[key])) for tag, key in columns.items()}
    for row in runs.RunDir(path).evals():
        name = row["protocol"].replace(":", "_").replace("/", "_")
        found |= {(f"{k}/{name}", int(row["epoch"]), float(row[k])) for k in ("error", "loss")}
    return found


def test_a_tracker_is_told_every_number_and_changes_none(starts):
    plain, tracked = run("runs=plain"), run("tracker=recorder")
    (only,) = starts
    assert set(only.told) == said(tracked.path)
    assert len(only.told) == len(set(only.told)) == 3 * 3 + 2 * 2 * 2
    assert only.ended == ["done"]
    assert plain.id == tracked.id  # it is no part of what a run is
    for key, value in weights(plain).items():
        assert torch.equal(value, weights(tracked)[key]), key
    for name in ("metrics.csv", "evals.csv"):
        assert (plain.path / name).read_bytes() == (tracked.path / name).read_bytes()
    assert run("tracker=recorder").skipped
    assert len(starts) == 1  # there was nothing to tell


def test_a_tracker_is_told_while_the_run_is_at_work(starts, monkeypatch):
    seen, train = [], worker.Trainer.train_epoch
    monkeypatch.setattr(
        worker.Trainer, "train_epoch", lambda self: (seen.append(len(starts[0].told)), train(self))
    )
    run("tracker=recorder")
    assert seen == [0, 3 + 4, 3 + 4 + 3]


@pytest.mark.parametrize("durable", [True, False])
def test_a_run_that_goes_on_tells_nothing_twice(starts, monkeypatch, durable):
    """The checkpoint is of epoch 1: the second is trained, and its row written, again. What a
    tracker that is not durable was told is lost with the process, and told again."""
    with monkeypatch.context() as killed:
        train = worker.Trainer.train_epoch
        killed.setattr(
            worker.Trainer, "train_epoch", lambda self: (train if self.epoch < 2 else kill)(self)
        )
        killed.setattr(Recorder, "durable", durable)
        killed.setattr(mirror._Mirror, "end", lambda _: None)
        with suppress(SystemExit):
            run("tracker=recorder", "checkpoint_every=1000")
    finished = run("tracker=recorder", "checkpoint_every=1000")
    first, second = starts
    assert len(first.told) == 3 + 4 + 3
    told = first.told * durable + second.told
    assert set(told) == said(finished.path)
    assert len(told) == len(set(told))


def kill(_):
    raise SystemExit


def test_a_run_that_begins_anew_removes_what_a_tracker_has_left(starts, monkeypatch):
    with monkeypatch.context() as killed:
        killed.setattr(worker.Trainer, "save", kill)
        with suppress(SystemExit):
            run("tracker=recorder")
    (path,) = launch.Path("runs").iterdir()
    assert (path / "tracked.json").exists()
    (path / "left").mkdir()
    (path / "left" / "behind").touch()
    run("tracker=recorder")
    assert set(starts[1].told) == said(path)
    assert not (path / "left").exists()


def test_a_tracker_that_is_asked_for_later_catches_up(starts):
    finished = run()
    assert run("tracker=recorder").skipped
    assert set(starts[0].told) == said(finished.path)
    run("tracker=recorder", "evals=[test:ema]")
    assert {tag for tag, _, _ in starts[1].told} == {"error/test_ema", "loss/test_ema"}
    assert starts[1].ended == ["done"]


@pytest.mark.parametrize("at", ["start", "log", "end"])
def test_a_tracker_that_fails_costs_a_line_and_not_the_run(monkeypatch, at):
    def fail(*_):
        raise RuntimeError("its server is gone\nand here is a traceback")

    class Failing(Recorder):
        pass

    if at != "start":
        monkeypatch.setattr(Failing, at, fail)
    offer(monkeypatch, fail if at == "start" else lambda *_: Failing())
    plain, tracked = run("runs=plain"), run("tracker=recorder")
    assert tracked.status == "done"
    for key, value in weights(plain).items():
        assert torch.equal(value, weights(tracked)[key]), key
    lines = [line for line in (tracked.path / "log.txt").read_text().splitlines()
             if "recorder" in line]  # fmt: skip
    once = "tracker recorder failed, and is told nothing more: RuntimeError: its server is gone"
    # As a run ends, what failed is tried once more.
    assert [line.endswith(once) for line in lines] == [True] * (1 if at == "end" else 2)


def test_only_the_first_rank_tells(starts, monkeypatch, tmp_path):
    composed = config.compose([*QUICK, "tracker=recorder"])
    job = worker.construct(composed)
    run_dir = runs.RunDir(tmp_path / "run")
    monkeypatch.setattr(worker, "work", lambda *_: {"status": "done"})
    for rank in (1, 0):
        monkeypatch.setattr(worker.dist, "place", lambda at=rank: (at, 2))
        (tmp_path / "run").mkdir(exist_ok=True)
        worker.finish(job, run_dir, worker.Stop())
        assert len(starts) == (rank == 0)


# -- what is refused ------------------------------------------------------------------------------


def test_a_tracker_whose_package_is_missing_is_refused_before_anything_is_written(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"^tracker=wandb needs .* 'normlab\[wandb\]'$"):
        run("tracker=wandb")
    assert list(launch.Path().iterdir()) == []


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("tensorbord", "no tracker 'tensorbord'; did you mean 'tensorboard'"),
        ("[mlflow,mlflow]", "tracker: one of them is named twice"),
        ("3", "tracker must be null, a name or a list of names, got tracker=3"),
        ("[3]", "no tracker '3'"),
    ],
)
def test_what_a_tracker_cannot_be(given, reason):
    with pytest.raises(config.ConfigError) as refused:
        config.check(config.compose([f"tracker={given}"]))
    assert reason in str(refused.value)


def test_a_tracker_may_be_named_where_a_run_goes_on(starts):
    first = run()
    launch.run(config.compose([f"resume={first.id}", "tracker=recorder"]), ("tracker",))
    assert set(starts[0].told) == said(first.path)
