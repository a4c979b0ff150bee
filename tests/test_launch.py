"""What becomes of a config: run, resume, skip, evaluate more, fail, diverge."""

import csv
import json
import logging
import math
import re

import pytest
import torch
import yaml

from normlab import config, environment, experiment, launch, runs, worker

QUICK = ["scale=demo", "norm=ghost", "nbs=8", "batch_size=64", "epochs=1", "device=cpu",
         "threads=1", "allocator=system", "evals=[val:ema]"]  # fmt: skip


pytestmark = pytest.mark.usefixtures("elsewhere")


def start(*overrides):
    return launch.run(config.compose([*QUICK, *overrides]))


def steps_made(monkeypatch):
    made = []
    original = worker.Trainer._train_step
    monkeypatch.setattr(worker.Trainer, "_train_step", lambda *a: (made.append(1), original(*a))[1])
    return made


def test_a_run_leaves_what_the_contract_names():
    outcome = start("evals=[train:augmented,train:batch,val:batch,val:ema,val:precise]")
    assert (outcome.status, outcome.skipped) == ("done", False)
    assert outcome.id.startswith("tiny-ghost-nbs8-s0-")
    names = {path.name for path in outcome.path.iterdir() if not path.name.startswith(".")}
    assert names == {
        "config.yaml", "env.json", "metrics.csv", "evals.csv", "checkpoint.pt", "log.txt",
        "status.json",
    }  # fmt: skip
    recorded = yaml.safe_load((outcome.path / "config.yaml").read_text())
    assert recorded["nbs"] == 8
    assert "oc.env" not in (outcome.path / "config.yaml").read_text()
    env = json.loads((outcome.path / "env.json").read_text())
    assert env["torch"] == torch.__version__
    assert env["threads"] == 1
    assert env["chance"] == 90
    assert f"nbs:{experiment.load('nbs').claims_digest('demo')}" in env["claims"].split()
    with (outcome.path / "evals.csv").open(newline="") as file:
        rows = {row["protocol"]: row for row in csv.DictReader(file)}
    assert set(rows) == set(outcome.summary)
    assert rows["val:batch"]["batch"] == "8"
    assert rows["val:ema"]["n"] == "300"
    with (outcome.path / "metrics.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["train_error"] == rows["train:augmented"]["error"]
    assert torch.load(outcome.path / "checkpoint.pt", weights_only=True)["position"]["epoch"] == 1


def test_a_finished_run_is_skipped(monkeypatch):
    first = start()
    made = steps_made(monkeypatch)
    before = {p: p.stat().st_mtime_ns for p in first.path.iterdir() if p.name != "log.txt"}
    second = start()
    assert second.skipped
    assert second.summary == first.summary
    assert not made
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_a_finished_run_computes_only_the_protocols_it_lacks(monkeypatch):
    first = start()
    made = steps_made(monkeypatch)
    second = start("evals=[val:ema,test:ema,val:precise/samples:96]")
    assert not made
    assert not second.skipped
    assert second.summary["val:ema"] == first.summary["val:ema"]
    assert set(second.summary) == {"val:ema", "test:ema", "val:precise/samples:96"}


def test_evaluating_later_is_evaluating_at_once():
    at_once = start("evals=[val:ema,val:precise,val:batch]", "eval_last=1")
    later = start("seed=1")
    later = launch.evaluate(later.id, ["val:precise", "val:batch"], root="runs")
    both = start("seed=1", "evals=[val:ema,val:precise,val:batch]", "runs=elsewhere")
    assert later.summary == both.summary
    assert at_once.summary != both.summary


def test_the_last_epochs_can_be_evaluated_later():
    at_once = start("epochs=3", "eval_last=2", "evals=[val:ema,val:precise]", "runs=a")
    later = start("epochs=3", "eval_last=2")
    later = launch.evaluate(later.id, ["val:precise"], root="runs")

    def rows(path):
        with (path / "evals.csv").open(newline="") as file:
            return {(r["epoch"], r["protocol"]): r["error"] for r in csv.DictReader(file)}

    assert rows(later.path) == rows(at_once.path)
    assert len(rows(later.path)) == 4


def test_evaluating_changes_no_weight_and_no_metric():
    few = start("epochs=3", "runs=few")
    many = start("epochs=3", "runs=many", "eval_last=3", "evals=[train:batch,val:precise,val:ema]")
    for key, value in torch.load(few.path / "checkpoint.pt", weights_only=True)["model"].items():
        other = torch.load(many.path / "checkpoint.pt", weights_only=True)["model"][key]
        assert torch.equal(value, other), key
    assert (few.path / "metrics.csv").read_text() == (many.path / "metrics.csv").read_text()
    assert few.id == many.id


def commit_results(outcome):
    results = runs.Path("results", "nbs")
    results.mkdir(parents=True)
    runs.table(outcome.path.parent).to_csv(results / "runs.csv", index=False)
    launch._committed.cache_clear()


def test_committed_results_count_as_done(monkeypatch):
    first = start("epochs=2", "eval_last=2")
    commit_results(first)
    made = steps_made(monkeypatch)
    fresh = start("epochs=2", "runs=fresh")
    assert (fresh.status, fresh.skipped, fresh.summary) == ("done", True, first.summary)
    assert fresh.place == "recorded in results/nbs/runs.csv; skip_done=local runs it here"
    assert start("epochs=2").place == str(first.path)  # where it is, it is read
    with pytest.raises(ValueError, match=r"recorded in results/nbs/runs.csv .*skip_done=local"):
        launch.evaluate(first.id[:-3], ["test:ema"], root="fresh")
    with pytest.raises(ValueError, match="no run 'elsewhere' under fresh"):
        launch.evaluate("elsewhere", ["test:ema"], root="fresh")
    banked = start("epochs=2", "runs=fresh", "ema_bank=[0.5]")
    assert banked.skipped
    assert re.match(r"ema_bank=\[0.5\]: .* skip_done=local runs it here", banked.lacking)
    assert not made
    assert not start("epochs=2", "runs=fresh", "skip_done=local").skipped
    assert made


def test_a_run_may_evaluate_nothing():
    outcome = start("evals=[]")
    assert (outcome.status, outcome.skipped, outcome.summary) == ("done", False, {})


def test_a_run_that_explodes_is_recorded_as_diverged_and_not_tried_again(monkeypatch):
    outcome = start("norm=none", "nbs=null", "lr=1e30", "epochs=3", "evals=[val:ema]")
    assert outcome.status == "diverged"
    assert outcome.summary == {}
    status = json.loads((outcome.path / "status.json").read_text())
    assert "epoch" in status["reason"]
    assert "train_loss" not in status or math.isfinite(status["train_loss"])
    made = steps_made(monkeypatch)
    assert start("norm=none", "nbs=null", "lr=1e30", "epochs=3").skipped
    assert not made


def test_a_failure_is_one_line_outside_and_a_traceback_in_the_log(monkeypatch):
    def broken(*_):
        raise RuntimeError("the disk is on fire\nand more")

    with monkeypatch.context() as patch:
        patch.setattr(worker.Trainer, "_train_step", broken)
        with pytest.raises(launch.JobError, match="the disk is on fire") as error:
            start()
    assert "\n" not in str(error.value)
    (run,) = runs.listed(runs.Path("runs"))
    assert run.status()["status"] == "failed"
    assert "Traceback" in run.log.read_text()
    assert start().status == "done"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["norm=gn", "nbs=null", "norm.groups=5"], "5"),
        (["norm.grouping=striped"], "norm.grouping.*contiguous, interleaved"),
        (["model.width=wide"], "model.width.*int"),
        (["data.subset=7"], "subset"),
        (["batch_size=2048"], "batch_size=2048"),
        (["batch_size=96", "remainder=error"], "remainder"),
    ],
)
def test_what_cannot_be_built_is_refused_before_anything_is_written(tmp_path, overrides, says):
    with pytest.raises(ValueError, match=says) as error:
        start(*overrides)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_evaluations_that_cannot_be_made_are_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="val offers 300"):
        start("batch_size=512", "nbs=512", "evals=[val:batch]")
    assert not list(tmp_path.iterdir())


def test_a_batch_that_is_formed_otherwise_than_said_is_refused(tmp_path):
    for overrides in (["norm=bn", "norm.batch=ghost"], ["norm=bn", "norm.batch=none", "nbs=null"]):
        with pytest.raises(ValueError, match="formed as per_rank"):
            start(*overrides)
    assert not list(tmp_path.iterdir())


def evaluated(outcome):
    with (outcome.path / "evals.csv").open(newline="") as file:
        return {(row["protocol"], int(row["epoch"])) for row in csv.DictReader(file)}


def test_a_finished_run_makes_what_it_can_and_says_what_it_cannot():
    first = start("epochs=3")
    before = (first.path / "evals.csv").read_text()
    wider = ["epochs=3", "eval_last=3", "evals=[train:augmented,val:ema,test:ema]"]
    second = start(*wider)
    assert (second.status, second.skipped) == ("done", False)
    assert "eval_last=3: run" in second.lacking
    assert f"epochs 1 to 2, without which they cannot be evaluated; delete {first.path} " in (
        second.lacking
    )
    # The last epoch's weights are there, and what training measured needs none.
    augmented = {("train:augmented", epoch) for epoch in (1, 2, 3)}
    assert evaluated(second) == {("val:ema", 3), ("test:ema", 3)} | augmented
    assert (first.path / "evals.csv").read_text().startswith(before)
    made = [float(row["error"]) for row in runs.RunDir(first.path).evals()]
    with (first.path / "metrics.csv").open(newline="") as file:
        assert [float(row["train_error"]) for row in csv.DictReader(file)] == made[1:4]

    again = start(*wider)
    assert (again.skipped, again.lacking) == (True, second.lacking)
    at_once = start(*wider, "runs=at_once")
    assert at_once.lacking == ""
    assert at_once.summary == second.summary
    assert evaluated(at_once) > evaluated(second)


def test_an_unfinished_run_is_not_continued_towards_evaluations_that_it_has_lost():
    first = start("epochs=3")
    (first.path / "status.json").unlink()
    with pytest.raises(ValueError, match=r"eval_last=2.*epoch 2, without .*; delete runs"):
        start("epochs=3", "eval_last=2")
    state = torch.load(first.path / "checkpoint.pt", weights_only=True)
    state["position"] = {"epoch": 2, "step": 1}  # the weights of epoch 2 have been trained on
    torch.save(state, first.path / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"eval_last=2.*epoch 2, without "):
        start("epochs=3", "eval_last=2")


def test_an_ema_bank_is_tracked_from_the_start_or_not_at_all():
    first = start("epochs=2")
    for evals in ("val:ema", "val:ema/decay:0.5"):
        second = start("epochs=2", "ema_bank=[0.5]", f"evals=[{evals}]")
        assert second.skipped
        assert re.match(r"ema_bank=\[0.5\]: run .* has tracked \[\]; delete runs", second.lacking)
    third = start("epochs=2", "ema_bank=[0.5]", "evals=[val:ema/decay:0.5,test:ema]")
    assert "has tracked []; delete" in third.lacking
    assert evaluated(third) == {("val:ema", 2), ("test:ema", 2)}
    (first.path / "status.json").unlink()
    with pytest.raises(ValueError, match=r"has tracked \[\]; delete"):
        start("epochs=2", "ema_bank=[0.5]")


def test_a_run_keeps_its_ema_bank_when_continued_without_asking_for_it(monkeypatch):
    twice = ["epochs=2", "eval_last=2"]
    original = worker.Trainer.train_epoch
    with monkeypatch.context() as patch:
        patch.setattr(
            worker.Trainer, "train_epoch", lambda t: original(t) if t.epoch == 0 else 1 / 0
        )
        with pytest.raises(launch.JobError):
            start(*twice, "ema_bank=[0.5,0.75]")
    start(*twice)
    wanted = [*twice, "ema_bank=[0.75]", "evals=[val:ema/decay:0.75]"]
    later = start(*wanted)
    assert later.lacking == ""
    at_once = start(*wanted, "runs=at_once")
    assert evaluated(later) > evaluated(at_once)
    assert later.summary["val:ema/decay:0.75"] == at_once.summary["val:ema/decay:0.75"]


@pytest.mark.parametrize("key", ["torch", "data_digest", "device"])
def test_a_run_continues_only_where_it_began(key):
    first = start()
    env = json.loads((first.path / "env.json").read_text())
    (first.path / "env.json").write_text(json.dumps(env | {key: "other"}))
    with pytest.raises(ValueError, match="other"):
        launch.evaluate(first.id, ["test:ema"], root="runs")
    (first.path / "status.json").unlink()
    with pytest.raises(ValueError, match="other"):
        start()


def test_a_run_resumed_with_other_code_names_both():
    first = start()
    env = json.loads((first.path / "env.json").read_text())
    (first.path / "env.json").write_text(json.dumps(env | {"source": "0ld0ld00"}))
    (first.path / "status.json").unlink()
    start()
    source = json.loads((first.path / "env.json").read_text())["source"]
    assert source == f"0ld0ld00+{runs.source_digest()}"


def test_a_run_that_lost_its_checkpoint_starts_anew_and_records_that():
    first = start("epochs=2", "eval_last=2")
    kept = (first.path / "evals.csv").read_text()
    env = json.loads((first.path / "env.json").read_text())
    (first.path / "env.json").write_text(json.dumps(env | {"torch": "older"}))
    (first.path / "evals.csv").write_text(kept.replace("val:ema", "val:batch"))
    for name in ("status.json", "checkpoint.pt"):
        (first.path / name).unlink()
    again = start("epochs=2", "eval_last=2")
    assert json.loads((again.path / "env.json").read_text())["torch"] == torch.__version__
    assert (again.path / "evals.csv").read_text() == kept


def test_threads_do_not_leak_from_run_to_run():
    default = environment.default_threads()
    start("threads=2")
    second = start("threads=null", "seed=1")
    assert json.loads((second.path / "env.json").read_text())["threads"] == default


def test_a_full_disk_is_a_failed_run_not_a_refusal(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs, "write_atomically", full)
    monkeypatch.setattr(worker.checkpoint, "write_atomically", full)
    monkeypatch.setattr(runs.RunDir, "write_config", lambda *_: None)
    monkeypatch.setattr(runs.RunDir, "write_env", lambda *_: None)
    monkeypatch.setattr(launch, "_set_threads", lambda *_: None)
    with pytest.raises(launch.JobError, match="No space left"):
        start()


def test_a_committed_diverged_run_is_not_tried_again(monkeypatch):
    commit_results(start("norm=none", "nbs=null", "lr=1e30", "epochs=3"))
    made = steps_made(monkeypatch)
    again = start("norm=none", "nbs=null", "lr=1e30", "epochs=3", "runs=fresh")
    assert (again.status, again.skipped) == ("diverged", True)
    assert not made


def test_an_ema_that_was_not_tracked_is_refused():
    first = start()
    with pytest.raises(ValueError, match="not tracked"):
        launch.evaluate(first.id, ["val:ema/decay:0.5"], root="runs")


def test_what_is_not_finished_is_not_evaluated():
    first = start()
    (first.path / "status.json").unlink()
    with pytest.raises(ValueError, match="unfinished"):
        launch.evaluate(first.id, ["val:ema"], root="runs")


def test_a_spoilt_checkpoint_is_refused_and_nothing_is_lost():
    first = start()
    (first.path / "status.json").unlink()
    (first.path / "checkpoint.pt").write_bytes(b"spoilt")
    before = {p.name: p.read_bytes() for p in first.path.iterdir() if p.is_file()}
    with pytest.raises(ValueError, match="checkpoint"):
        start()
    assert {p.name: p.read_bytes() for p in first.path.iterdir() if p.is_file()} == before


def test_threads_are_those_the_run_began_with(caplog):
    first = start("threads=2")
    (first.path / "status.json").unlink()
    with caplog.at_level(logging.INFO, "normlab"):
        start("threads=1")
    assert torch.get_num_threads() == 2
