"""A task as a run: its id, its rows, how it ends, and what of the config it takes."""

import csv
import json
import os
import re
import signal
import sys
import types
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from normlab import cli, config, experiment, launch, perform, plugins, runs, tasks, trackers
from normlab.config import ConfigError
from normlab.tasks.base import Row

OPTIONS = """# A walk of so many steps.
name: walk
steps: 3
stride: 1.0
"""
WALK = ["task=walk", "norm=ghost", "nbs=8"]


def walk(
    *, seed: int, device: torch.device, norm, lr: float, steps: int, stride: float
) -> Iterator[Row]:
    """Rows of a walk whose every step is drawn, and the size of a layer."""
    layer = norm(3).to(device)
    drawn = torch.Generator().manual_seed(seed)
    place = 0.0
    for step in range(1, steps + 1):
        place += stride * lr * float(torch.rand((), generator=drawn))
        yield Row(step, "place", place)
    yield Row(steps, "nbs", float(layer.nbs))


@pytest.fixture(autouse=True)
def installed(tmp_path, monkeypatch):
    """An installed package with a task, in a working directory of its own."""
    module = types.ModuleType("walking")
    module.run, module.KEYS = walk, ("norm", "lr")
    monkeypatch.setattr(walk, "__module__", "walking")
    monkeypatch.setitem(sys.modules, "walking", module)
    conf = tmp_path / "package" / "conf"
    (conf / "task").mkdir(parents=True)
    (conf / "task" / "walk.yaml").write_text(OPTIONS)
    own = plugins.conf_dirs()
    monkeypatch.setattr(plugins, "conf_dirs", lambda: [*own, conf])
    point = EntryPoint("walk", "walking:run", "normlab.tasks")
    monkeypatch.setattr(plugins, "_all", lambda: (point,))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    launch._committed.cache_clear()
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)


def start(*overrides, named=()):
    return launch.run(config.compose([*WALK, *overrides]), named)


def identity(*overrides):
    composed = config.compose([*WALK, *overrides])
    return config.run_id(composed, device="cpu", data_digest="", kernels=False)


def test_a_tracker_is_told_what_a_task_has_measured(monkeypatch):
    told = {}
    tracker = types.SimpleNamespace(
        durable=True, log=lambda values, epoch: told.update({epoch: values}), end=lambda _: None
    )
    monkeypatch.setattr(trackers, "find", lambda _: lambda *_: tracker)
    monkeypatch.setattr(trackers, "check", lambda _: None)
    outcome = start("device=cpu", "tracker=tensorboard")
    rows = runs.RunDir(outcome.path).probes()
    assert sum(map(len, told.values())) == len(rows) == 4
    for row in rows:
        assert told[int(row["epoch"])][f"walk/{row['quantity']}"] == float(row["value"])


def test_a_task_leaves_rows_and_a_status():
    outcome = start("device=cpu")
    assert (outcome.status, outcome.skipped, outcome.summary) == ("done", False, {})
    assert outcome.id == identity()
    assert outcome.id.startswith("walk-ghost-s0-")
    assert outcome.values["walk.nbs"] == 8
    with (outcome.path / "probes.csv").open(newline="") as file:
        rows = [
            (r["probe"], r["quantity"], int(r["epoch"]), float(r["value"]))
            for r in csv.DictReader(file)
        ]
    steps = torch.rand(3, generator=torch.Generator().manual_seed(0)).double()
    places = (0.1 * steps).cumsum(0).tolist()
    assert [row[:3] for row in rows] == [
        *(("walk", "place", at) for at in (1, 2, 3)),
        ("walk", "nbs", 3),
    ]
    assert [row[3] for row in rows[:3]] == pytest.approx(places)
    names = {path.name for path in outcome.path.iterdir() if not path.name.startswith(".")}
    assert names == {"config.yaml", "env.json", "probes.csv", "log.txt", "status.json"}
    env = json.loads((outcome.path / "env.json").read_text())
    assert (env["nbs"], env["takes"], env["world_size"]) == (8, ["norm", "lr", "decay", "nbs"], 1)
    assert "ended" in env
    assert "data_digest" not in env
    (row,) = (r for r in runs.table(Path("runs")).to_dict("records") if r["protocol"] == "walk.nbs")
    assert (row["norm"], row["nbs"], row["lr"], row["value"]) == ("ghost", 8, 0.1, 8)
    assert row["model"] is None
    assert row["batch_size"] is None


def test_the_id_depends_on_what_the_task_takes_and_on_nothing_else():
    same = ["batch_size=64", "model=resnet8", "data=synthetic", "epochs=3", "scale=desk",
            "recipe=step", "world_size=2", "order=sorted"]  # fmt: skip
    assert {identity(word) for word in same} == {identity()}
    other = [
        "seed=1",
        "lr=0.2",
        "nbs=16",
        "decay=0.5",
        "norm.eps=1e-3",
        "task.steps=4",
        "precision=bf16",
    ]
    assert len({identity(word) for word in (*other, "seed=0")}) == len(other) + 1
    composed = [config.compose([*WALK, f"seed={seed}"]) for seed in (0, 1)]
    assert len({config.cell_key(one) for one in composed}) == 1


def test_a_finished_task_is_skipped_and_a_committed_one_too(monkeypatch):
    first = start()
    monkeypatch.setattr(perform, "perform", lambda *_: pytest.fail("it runs again"))
    assert start().skipped
    Path("results/lab").mkdir(parents=True)
    runs.table(Path("runs")).to_csv("results/lab/runs.csv", index=False)
    launch._committed.cache_clear()
    fresh = start("runs=fresh")
    assert (fresh.skipped, fresh.values) == (True, first.values)
    assert fresh.recorded == Path("results/lab/runs.csv")


def instead(monkeypatch, rows):
    """Let the task yield these rows, each a Row or what is called for one."""

    def run(*, seed, device, norm, lr, steps: int, stride: float) -> Iterator[Row]:  # noqa: ARG001
        for row in rows:
            yield row() if callable(row) else row

    monkeypatch.setattr(run, "__module__", "walking")
    monkeypatch.setattr(sys.modules["walking"], "run", run)


def test_a_failed_task_is_recorded_and_starts_anew(monkeypatch):
    with monkeypatch.context() as patch:
        instead(patch, [Row(1, "place", 7.0), lambda: 1 / 0])
        with pytest.raises(launch.JobError, match="division by zero"):
            start()
    (run,) = runs.listed(Path("runs"))
    assert run.status()["status"] == "failed"
    assert "Traceback" in run.log.read_text()
    assert run.probes() == []
    again = start()
    assert (again.status, again.id) == ("done", run.id)
    assert len(run.probes()) == 4


def test_a_signal_ends_a_task_at_its_next_row(monkeypatch):
    def signalled():
        os.kill(os.getpid(), signal.SIGTERM)
        return Row(2, "place", 2.0)

    instead(monkeypatch, [Row(1, "place", 1.0), signalled, lambda: pytest.fail("it goes on")])
    with pytest.raises(SystemExit) as ended:
        start()
    assert ended.value.code == 143
    (run,) = runs.listed(Path("runs"))
    assert (run.status(), run.probes()) == ({}, [])


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("train task=wlak", "no task 'wlak'; did you mean 'walk'? (task: "),
        ("train task=walk task.strides=2", "no key 'task.strides'; did you mean 'stride'?"),
        ("train task=walk task.steps=long", "task.steps='long': task=walk wants int"),
        ("train task=walk norm=gn nbs=8", "nbs=8"),
        ("train task=walk batch_size=32", "batch_size: task=walk does not take it (it takes"),
        ("train task=walk model.width=8", "model.width: task=walk does not take it"),
        ("train task=walk evals=[val:ema]", "evals: task=walk does not take it"),
        ("train task=walk probes=[ema_trace]", "probes: task=walk does not take it"),
        ("eval RUN test:ema", "is of a task and left no network to evaluate"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_a_line(line, says, capfd):
    run = start().id if "RUN" in line else ""
    before = sorted(Path().rglob("*"))
    assert cli.main(line.replace("RUN", run).split()) == 2
    (said,) = capfd.readouterr().err.splitlines()
    assert says in said
    assert sorted(Path().rglob("*")) == before


def test_what_a_task_cannot_ask_for_is_refused(monkeypatch):
    monkeypatch.setattr(sys.modules["walking"], "KEYS", ("norm", "moon"))
    with pytest.raises(ConfigError, match="task 'walk' asks for moon; there are norm, model, data"):
        start()


def test_keys_are_read_without_importing(tmp_path, monkeypatch):
    source = tmp_path / "walks.py"
    source.write_text(
        'KEYS: tuple[str, ...] = ("model", "epochs")\nimport nowhere\n\ndef run(): ...\n'
    )
    monkeypatch.setattr(plugins.Room, "own", lambda _: {"walks": source})
    assert tasks.keys("walks") == ("model", "epochs")
    assert tasks.needs({"name": "mine", "module": "walks"}) == ("norm", "model", "data", "epochs")


def test_tasks_are_shown(capsys):
    assert cli.main(["show", "tasks"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^walk +A walk of so many steps\.$", said, re.MULTILINE)
    assert "steps=3 stride=1.0" in said


EXPERIMENT = """
title: Walks
source: an example
set: {task: walk, norm: ghost, nbs: 8}
scales: {demo: {axes: {task.steps: [2, 3], seed: [0, 1]}}}
protocols: {test: {eval: "test:ema", label: test}}
baseline: {task.steps: 2}
table: {columns: [test]}
figure: {kind: curves, x: task.steps, xlabel: steps, log2: false, series: [test]}
published: []
claims: {}
"""


def test_a_sweep_runs_its_cells_and_tells_them_beforehand(tmp_path, monkeypatch, capsys):
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "walks.yaml").write_text(EXPERIMENT)
    monkeypatch.setattr(plugins, "experiment_dirs", lambda: [tmp_path / "lab"])
    experiment.load.cache_clear()
    assert cli.main(["sweep", "walks", "seed=0"]) == 0
    assert "2 cells: 2 done (2 run, 0 skipped)" in capsys.readouterr().out
    assert cli.main(["sweep", "walks", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "4 cells: 2 done, 2 missing" in said or "4 cells: 1 done, 1 missing" in said
    assert "?: 2 cells cannot be probed here: a task runs from its beginning to its end" in said
    experiment.load.cache_clear()
