"""`normlab sweep <name> --dry-run`: cells, their state, and what they take, with nothing run."""

import re
import types
from pathlib import Path

import pytest

from normlab import cli, config, experiment, forecast, launch, runs, worker
from normlab.data.base import Dataset
from normlab.forecast import Cost, cells, probing

SMALL = ["data.subset=640", "epochs=3", "eval_last=2", "threads=1", "device=cpu",
         "allocator=system", "nbs=8,32", "seed=100,101"]  # fmt: skip
FIXED = Cost(seconds=10.0, memory=10**9, disk=2 * 10**6)


pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture
def fixed(monkeypatch):
    """Probes that say the same of every run; and of which runs they were asked."""
    asked = []

    def say(config, *, threads):
        asked.append((config["nbs"], config["norm"]["name"], threads))
        return FIXED

    monkeypatch.setattr(forecast, "probe", say)
    monkeypatch.setattr(forecast, "warm_up", lambda _: None)
    return asked


def composed(name, *words):
    """A cell as a run of its own has it."""
    return config.compose([f"experiment={name}", *words])


@pytest.mark.parametrize(
    ("name", "words", "first", "count"),
    [
        ("nbs", ["seed=100,101"], ["nbs=2", "seed=100"], 14),
        ("nbs", ["nbs=16", "seed=range(100,104)", "lr=0.1,0.2"],
         ["nbs=16", "seed=100", "lr=0.1"], 8),
        ("renorm", ["arm=br-4,bn-4", "seed=100"], ["arm=br-4", "seed=100"], 2),
    ],
)  # fmt: skip
def test_the_cells_are_those_of_the_sweep(name, words, first, count):
    found = cells.listed(name, words)
    assert len(found) == len({cell.id for cell in found}) == count
    assert {cell.state for cell in found} == {"missing"}
    whole = composed(name, *first)
    assert {**found[0].config, "runs": None} == {**whole, "runs": None}
    assert all(f"-s{cell.config['seed']}-" in cell.id for cell in found)


@pytest.mark.slow
@pytest.mark.parametrize("name", experiment.names())
def test_every_experiment_is_listed_at_demo(name):
    found = cells.listed(name, ["scale=demo"])
    assert len(found) == len(experiment.load(name).cells("demo"))
    assert all(cell.id for cell in found)


@pytest.mark.usefixtures("fixed")
def test_each_state_is_told_and_what_is_left(capsys):
    def run(*words):
        return launch.run(composed("nbs", *SMALL[:-2], *words))

    done = run("nbs=8", "seed=100")
    half = run("nbs=8", "seed=101")
    (half.path / "status.json").unlink()
    rows = (half.path / "metrics.csv").read_text().splitlines(keepends=True)
    (half.path / "metrics.csv").write_text("".join(rows[:2]))
    committed = run("nbs=32", "seed=100", "runs=other")
    Path("results/nbs").mkdir(parents=True)
    runs.table(Path("other")).to_csv("results/nbs/runs.csv", index=False)
    launch._committed.cache_clear()
    before = tree()

    assert forecast.main("nbs", SMALL) == 0
    assert tree() == before
    said = capsys.readouterr().out
    assert re.search(rf"{done.id} +nbs=8 seed=100 +done\n", said)
    assert re.search(rf"{committed.id} +nbs=32 seed=100 +committed\n", said)
    (left,) = re.findall(rf"{half.id} +nbs=8 seed=101 +unfinished +(\S+) s +1.0 GB +2.0 MB\n", said)
    assert 20 / 3 <= float(left) < 10 + 20 / 3
    assert "4 cells: 1 done, 1 unfinished, 1 committed, 1 missing" in said
    assert "to do: 2 cells" in said


def tree():
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def test_totals_are_those_of_the_missing_cells_side_by_side(fixed, capsys, monkeypatch):
    monkeypatch.setattr(forecast.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(cells.time, "perf_counter", lambda: 0.0)
    joblib = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    assert forecast.main("nbs", [*SMALL, *joblib]) == 0
    said = capsys.readouterr().out
    assert "to do: 4 cells, 40.0 s; 2 side by side: 20.0 s, 2.0 GB of memory, 8.0 MB of" in said
    assert fixed == [(8, "ghost", 2), (32, "ghost", 2)]


def test_only_some_kinds_are_probed_and_the_nearest_speak_for_the_others(fixed, capsys):
    assert forecast.main("nbs", ["seed=100"]) == 0
    said = capsys.readouterr().out
    assert [nbs for nbs, *_ in fixed] == [2, 128, 16, 4]
    about = dict(re.findall(r"-nbs(\d+)-\S+ +nbs=\d+ +missing +(~?)\d", said))
    assert about == {"2": "", "4": "", "8": "~", "16": "", "32": "~", "64": "~", "128": ""}
    assert "~: as the most similar of these" in said


@pytest.mark.parametrize(
    ("words", "others", "nearest"),
    [
        (["nbs=4"], [["nbs=2"], ["nbs=128"]], 0),
        (["nbs=64", "lr=1"], [["nbs=2"], ["nbs=128"]], 1),
        (["norm=gn", "nbs=null"], [["norm=ghost", "nbs=8"], ["norm=gn", "nbs=null", "lr=1"]], 1),
        (["nbs=8"], [["nbs=8", "model=resnet8"], ["nbs=128"]], 1),
    ],
)
def test_what_is_nearest(words, others, nearest):
    configs = [composed("nbs", *other) for other in others]
    cell = composed("nbs", *words)
    assert min(configs, key=lambda other: forecast.distance(cell, other)) is configs[nearest]


def test_a_probe_measures_steps_and_images_and_scales_them(monkeypatch):
    """By a clock that only a training step, one second, and an evaluated image, 1 ms, move."""
    now = [0.0]
    clock = types.SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(probing, "time", clock)
    step, deliver = worker.Trainer._train_step, Dataset.eval_batches

    def stepping(*args):
        now[0] += 1.0
        return step(*args)

    def delivering(*args, **how):
        for x, y in deliver(*args, **how):
            now[0] += 0.001 * len(y)
            yield x, y

    monkeypatch.setattr(worker.Trainer, "_train_step", stepping)
    monkeypatch.setattr(Dataset, "eval_batches", delivering)
    monkeypatch.setattr(probing, "SECONDS", 1e9)
    evals = "evals=[train:augmented,val:ema,test:precise/batch:8,val:batch/batch:8]"
    cell = composed("nbs", *SMALL[:-2], "nbs=8", "epochs=200", evals)
    cost = probing.probe(cell, threads=None)
    images = 300 + (640 + 500) + 300  # val:ema, test:precise with all training images, val:batch
    assert cost.seconds == pytest.approx(5 * 200 + 2 * 0.001 * images)


def test_a_probe_weighs_what_a_run_leaves():
    cell = composed("nbs", *SMALL[:-2], "nbs=8", "seed=100")
    cost = probing.probe(cell, threads=None)
    path = launch.run(cell).path
    left = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert 0.7 * left < cost.disk < 1.3 * left
    assert cost.memory > 10**8
    assert cost.seconds > 0


def test_scratch_directories_are_removed(tmp_path, monkeypatch):
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(probing.tempfile, "tempdir", str(tmp_path / "scratch"))
    assert cli.main(["sweep", "nbs", "--dry-run", *SMALL, "nbs=8", "seed=100"]) == 0
    assert list(tmp_path.rglob("*")) == [tmp_path / "scratch"]


@pytest.mark.usefixtures("fixed")
def test_a_cell_that_is_refused_is_listed_with_the_reason(capsys):
    assert cli.main(["sweep", "nbs", "--dry-run", "nbs=3,8", "seed=100"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"nbs=3 +refused\n", said)
    assert "2 cells: 1 refused, 1 missing" in said
    assert "refused: nbs=3 does not divide batch_size=128" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nbs", "--dry-run", "nbs=3"], "nbs=3 does not divide"),
        (["nbs", "--dry-run", "nsb=3"], "no key 'nsb'; did you mean 'nbs'"),
        (["nbs", "--dry-run", "scale=huge"], "has no scale 'huge'"),
        (["nbs", "--dry-run", "-m"], "takes overrides"),
        (["nbs", "--dry-run", "hydra/launcher=joblib", "hydra.launcher.n_jobs=many"], "n_jobs"),
        (["nbs", "--dry-run", "scale=paper", "world_size=1", "device=cpu", "data_root=nowhere"],
         "nowhere"),
    ],
)  # fmt: skip
def test_what_cannot_be_forecast_is_refused_in_a_line(words, says, capsys):
    assert cli.main(["sweep", *words]) == 2
    said = capsys.readouterr()
    (line,) = said.err.strip().splitlines()
    assert says in line
    assert (said.out, list(Path().iterdir())) == ("", [])
