"""What a run measures after which epochs: at once, later, after an interruption, and no more."""

import csv
from pathlib import Path

import pytest
import torch

from normlab import agenda, checkpoint, config, launch, runs, worker
from normlab.probes import ema_trace, feature_evolution

QUICK = [
    "scale=demo",
    "norm=ghost",
    "nbs=8",
    "batch_size=64",
    "epochs=4",
    "device=cpu",
    "data.subset=320",
    "threads=1",
    "allocator=system",
    "evals=[train:augmented,val:ema]",
]
PROBES = "probes=[ema_trace,feature_evolution]"  # fmt: skip


pytestmark = pytest.mark.usefixtures("elsewhere")


def start(*overrides):
    return launch.run(config.compose([*QUICK, *overrides]))


def rows(path, name="probes.csv"):
    with (path / name).open(newline="") as file:
        return [tuple(row.values()) for row in csv.DictReader(file)]


def at(path):
    """(what, epoch) of all that a run has measured."""
    return runs.RunDir(path).measured()


def test_what_is_wanted_and_when():
    composed = config.compose([*QUICK, PROBES, "eval_last=2", "eval_at=[3,0,1]"])
    assert agenda.epochs(composed) == [0, 1, 3, 4]
    named = [(epoch, str(one)) for epoch, one in agenda.wanted(composed)]
    before = [(0, "val:ema"), (0, "ema_trace"), (0, "feature_evolution")]
    assert named[:3] == before  # nothing is trained that could have been augmented
    assert len(named) == 3 + 3 * 4


def test_a_run_is_measured_before_during_and_after_training():
    plain = start("runs=plain")
    measured = start(PROBES, "eval_at=[0,2]")
    assert measured.id == plain.id
    assert at(measured.path) == {
        *(("train:augmented", epoch) for epoch in (2, 4)),
        *((one, e) for one in ("val:ema", "ema_trace", "feature_evolution") for e in (0, 2, 4)),
    }
    assert measured.values["ema_trace.z"] > 0
    last = [row for row in rows(measured.path) if row[:3] == ("ema_trace", "z", "4")]
    assert float(last[0][3]) == measured.values["ema_trace.z"]
    # Measuring changes no weight and no number of the training.
    assert (plain.path / "metrics.csv").read_bytes() == (measured.path / "metrics.csv").read_bytes()
    ours, theirs = (
        torch.load(one.path / "checkpoint.pt", weights_only=True)["model"]
        for one in (plain, measured)
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_network_before_training_is_that_of_the_seed():
    measured = start("eval_at=[0]", PROBES)
    job = worker.construct(config.compose(QUICK))
    wanted = feature_evolution.measure(worker.context(job, 0))
    found = {
        q: float(v) for p, q, e, v in rows(measured.path) if (p, e) == ("feature_evolution", "0")
    }
    assert found == wanted


def test_a_finished_run_makes_the_probes_that_it_can_and_says_which_not():
    first = start("eval_at=[2]")
    second = start(PROBES, "eval_at=[0,1,2]")
    assert (second.status, second.skipped) == ("done", False)
    assert second.lacking.startswith(
        f"eval_at=[0, 1, 2]: run {first.id} has not kept the weights of epoch 1, without"
    )
    probes = {(one, e) for one in ("ema_trace", "feature_evolution") for e in (0, 2, 4)}
    assert at(second.path) == probes | {
        ("val:ema", 0), ("val:ema", 2), ("val:ema", 4), ("train:augmented", 1),
        ("train:augmented", 2), ("train:augmented", 4),
    }  # fmt: skip
    kept = (second.path / "probes.csv").read_bytes()
    again = start(PROBES, "eval_at=[0,1,2]")
    assert (again.skipped, again.lacking) == (True, second.lacking)
    assert (again.path / "probes.csv").read_bytes() == kept
    at_once = start(PROBES, "eval_at=[0,1,2]", "runs=at_once")
    assert set(rows(at_once.path)) > set(rows(second.path))


@pytest.mark.parametrize("where", ["before training", "between probes", "in an epoch"])
def test_an_interrupted_run_ends_with_the_same_rows(monkeypatch, where):
    asked = [PROBES, "eval_last=2", "eval_at=[0]"]
    whole = start(*asked, "runs=whole")
    made = []
    probe, epoch = worker._probe, worker.Trainer.train_epoch

    def stopped(stop):
        made.append(stop)
        if where == "in an epoch" if stop == 3 else (where, len(made)) in {
            ("before training", 2), ("between probes", 6),
        }:  # fmt: skip
            raise RuntimeError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(worker, "_probe", lambda *a: (stopped("probe"), probe(*a)))
        patch.setattr(worker.Trainer, "train_epoch", lambda t: (stopped(t.epoch), epoch(t)))
        with pytest.raises(launch.JobError, match="stopped"):
            start(*asked)
    parted = start(*asked)
    for name in ("probes.csv", "evals.csv", "metrics.csv"):
        assert (parted.path / name).read_bytes() == (whole.path / name).read_bytes(), name


def test_an_unfinished_run_is_not_continued_towards_probes_that_it_has_lost():
    first = start()
    (first.path / "status.json").unlink()
    with pytest.raises(ValueError, match=r"eval_at=\[2\]: run .* epoch 2, without .*; delete runs"):
        start("eval_at=[2]", PROBES)
    # Those before training need only the seed.
    resumed = start("eval_at=[0]", PROBES)
    assert ("ema_trace", 0) in at(resumed.path)
    assert resumed.lacking == ""


def commit_results(outcome):
    results = Path("results", "lab")
    results.mkdir(parents=True)
    runs.table(outcome.path.parent).to_csv(results / "runs.csv", index=False)
    launch._committed.cache_clear()


def test_committed_probes_count_as_made():
    first = start(PROBES)
    commit_results(first)
    fresh = start(PROBES, "runs=fresh")
    assert (fresh.skipped, fresh.recorded) == (True, Path("results/lab/runs.csv"))
    assert (fresh.summary, fresh.values) == (first.summary, first.values)
    assert start(PROBES, "eval_at=[0]", "runs=fresh").recorded is None


def test_the_table_has_a_row_for_each_number_of_a_probe():
    outcome = start("probes=[feature_evolution]", "eval_at=[1]")
    table = runs.table(Path("runs"))
    assert list(table.columns) == runs.COLUMNS
    probed = table[table["value"].notna()]
    assert set(probed["protocol"]) == {
        f"feature_evolution.{quantity}"
        for quantity in ("p01", "p20", "p80", "p99", "range", "log2_range")
    }
    assert sorted(set(probed["epoch"])) == [1, 4]
    assert probed["error"].isna().all()
    assert table[table["value"].isna()]["error"].notna().all()
    last = probed[(probed["epoch"] == 4) & (probed["protocol"] == "feature_evolution.range")]
    assert last["value"].tolist() == [outcome.values["feature_evolution.range"]]


def test_a_run_from_before_there_were_probes_lacks_them():
    first = start()
    run, later = runs.RunDir(first.path), ("probes", "eval_at", "task")
    run.write_config({key: value for key, value in run.config().items() if key not in later})
    evaluated = launch.evaluate(first.id, ["test:ema"], root="runs")
    assert set(evaluated.summary) == {"train:augmented", "val:ema", "test:ema"}
    assert start(PROBES).values


def test_probes_of_several_ranks_are_made_when_these_have_ended():
    """Of what they have agreed on: what one process measures that loads it."""
    words = ["scale=demo", "norm=bn", "nbs=32", "data=synthetic", "data.n=128", "batch_size=64",
             "epochs=2", "device=cpu", "threads=1", "allocator=system", "evals=[val:ema]",
             "eval_at=[0,1]", "world_size=2"]  # fmt: skip
    outcome = launch.run(config.compose([*words, PROBES]))
    assert (outcome.status, outcome.lacking) == ("done", "")
    assert {(one, e) for one, e in at(outcome.path) if ":" not in one} == {
        (one, epoch) for one in ("ema_trace", "feature_evolution") for epoch in (0, 1, 2)
    }
    job = worker.construct(config.compose(words))
    run = runs.RunDir(outcome.path)
    job.model.load_state_dict(checkpoint.load(run.snapshot(1))["model"])
    wanted = ema_trace.measure(worker.context(job, 1))
    found = {q: float(v) for p, q, e, v in rows(run.path) if (p, e) == ("ema_trace", "1")}
    assert found == pytest.approx(wanted, rel=1e-5)
