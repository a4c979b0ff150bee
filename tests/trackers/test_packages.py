"""What the trackers themselves have of a run, read back with their own means: every number of its
files, once, and the config."""

import importlib.util
import sqlite3
import struct
from pathlib import Path

import numpy as np
import pytest

from normlab import config, launch, runs, worker
from normlab.trackers import mirror

QUICK = ["scale=demo", "norm=ghost", "nbs=8", "batch_size=64", "epochs=3", "device=cpu",
         "threads=1", "allocator=system", "evals=[val:ema,val:precise/samples:64]", "eval_at=[1]",
         "data.subset=130"]  # fmt: skip

pytestmark = pytest.mark.usefixtures("elsewhere")


def interrupted_and_finished(tracker, monkeypatch):
    """A run that one start has begun and another has ended, and later evaluated once more."""
    with monkeypatch.context() as killed:
        train = worker.Trainer.train_epoch

        def until_the_third(self):
            if self.epoch == 2:
                raise SystemExit
            train(self)

        killed.setattr(worker.Trainer, "train_epoch", until_the_third)
        with pytest.raises(SystemExit):
            launch.run(config.compose([*QUICK, f"tracker={tracker}"]))
    done = launch.run(config.compose([*QUICK, f"tracker={tracker}"]))
    assert "failed" not in (done.path / "log.txt").read_text()
    launch.evaluate(done.id, ["test:ema"], root="runs")
    return runs.RunDir(done.path)


def needs(extra):
    if importlib.util.find_spec(extra) is None:
        pytest.skip(f"needs the extra {extra}")


def expected(run):
    found = [(tag, at, float(text)) for at, of in mirror.numbers(run).items()
             for tag, text in of.items()]  # fmt: skip
    assert len(found) == 3 * 3 + 2 * 2 * 3
    return sorted(found)


def test_tensorboard_has_the_numbers_of_the_files(monkeypatch):
    needs("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = interrupted_and_finished("tensorboard", monkeypatch)
    assert len(list(run.path.glob("events.out.tfevents.*"))) == 3  # a file for each start
    read = EventAccumulator(str(run.path)).Reload()
    tags = read.Tags()
    found = [(tag, at.step, at.value) for tag in tags["scalars"] for at in read.Scalars(tag)]
    single = [(tag, at, float(np.float32(value))) for tag, at, value in expected(run)]
    assert sorted(found) == single  # it keeps four bytes of a number
    rows = run.metrics()
    assert [at.value for at in read.Scalars("error/train")] == [
        float(np.float32(row["train_error"])) for row in rows
    ]
    (text,) = read.Tensors("config/text_summary")
    assert "    lr: 0.1\n" in text.tensor_proto.string_val[0].decode()
    assert "_hparams_/session_start_info" in tags["tensors"] or read.SummaryMetadata(
        "_hparams_/session_start_info"
    )


def test_mlflow_has_the_numbers_of_the_files(monkeypatch):
    """Its database, without its client."""
    needs("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = interrupted_and_finished("mlflow", monkeypatch)
    with sqlite3.connect(run.path / "mlflow" / "mlflow.db") as database:
        (only,) = database.execute("select name, status from runs").fetchall()
        assert only == (run.id, "FINISHED")
        found = database.execute("select key, step, value from metrics").fetchall()
        parameters = dict(database.execute("select key, value from params").fetchall())
    assert sorted(found) == expected(run)
    assert parameters["norm.name"] == "ghost"
    assert parameters["micro_batch"] == "null"
    assert not Path("mlruns").exists()


def test_wandb_has_the_numbers_of_the_files(monkeypatch):
    """Its offline files, of which there is one for each start; synchronized, they are one run."""
    needs("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    run = interrupted_and_finished("wandb", monkeypatch)
    found, ids = [], set()
    files = sorted(run.path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 3
    for path in files:
        for content in records(path.read_bytes()):
            record = Record.FromString(content)
            if record.HasField("run"):
                ids.add((record.run.run_id, record.run.display_name, record.run.host))
                keys = {update.key: update.value_json for update in record.run.config.update}
                assert keys["lr"] == "0.1"
            if record.HasField("history"):
                row = {(at.key or at.nested_key[0]): float(at.value_json)
                       for at in record.history.item if not at.key.startswith("_")
                       and not (at.nested_key and at.nested_key[0].startswith("_"))}  # fmt: skip
                at = int(row.pop("epoch"))
                found += [(tag, at, value) for tag, value in row.items()]
    assert sorted(found) == expected(run)
    ((known, name, host),) = ids
    assert (name, host) == (run.id, "")
    assert known.startswith(run.id)


def records(data):
    """The records of a file in LevelDB's log format, after a header of seven bytes."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part of one
            yield whole
            whole = b""
