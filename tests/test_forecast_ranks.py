"""The forecast of runs over ranks: a probe of real ranks, or in words why there is none."""

import json
import types
from dataclasses import asdict
from pathlib import Path

import agents
import pytest
import torch

from normlab import config, forecast, launch, worker
from normlab.data.base import Dataset
from normlab.forecast import Cost, probing, rank
from normlab.forecast.probing import Taken
from normlab.ranks import RankFailed

PAIR = ["experiment=nbs", "data.subset=640", "batch_size=64", "norm=sync", "nbs=64", "world_size=2",
        "threads=1", "device=cpu", "allocator=system", "epochs=3", "eval_last=2"]  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def of_ranks(cell):
    """What each rank took, and the forecast of it all, as files."""
    original = probing._of_ranks

    def noting(*arguments, **options):
        taken = original(*arguments, **options)
        Path("taken").write_text(json.dumps([asdict(one) for one in taken]))
        return taken

    probing._of_ranks = noting
    Path("cost").write_text(json.dumps(asdict(probing.probe(cell, threads=None))))


def clocked(run):
    """A rank with a clock that only its steps move, by 1 or 2 s, and images that it evaluates, by
    1 ms. The slower one finds it time to break an epoch off first."""
    number = worker.ranks.place()[0]
    now, steps = [0.0], []
    probing.time = types.SimpleNamespace(perf_counter=lambda: now[0])
    step, deliver = worker.Trainer._train_step, Dataset.eval_batches

    def stepping(*arguments):
        now[0] += 1 + number
        steps.append(number)
        return step(*arguments)

    def delivering(*arguments, **how):
        for x, y in deliver(*arguments, **how):
            now[0] += 0.001 * len(y)
            yield x, y

    worker.Trainer._train_step, Dataset.eval_batches = stepping, delivering
    work = worker.work

    def working(*arguments):
        status = work(*arguments)
        Path(f"steps-{number}").write_text(str(len(steps)))
        return status

    worker.work = working
    rank.main(run)


def test_ranks_are_probed_as_they_run(tmp_path):
    """Each says what it took, of its own share; all break off at the same step."""
    cell = config.compose([*PAIR, "evals=[val:ema,test:ema]"])
    process = agents.start(tmp_path, of_ranks, cell, rank=clocked)
    process.join(120)
    assert process.exitcode == 0, (tmp_path / "output.txt").read_text()
    taken = [Taken(**one) for one in json.loads((tmp_path / "taken").read_text())]
    # In each of three epochs the slower one finds after two steps that more than 2 s are over.
    assert [(tmp_path / f"steps-{number}").read_text() for number in (0, 1)] == ["6", "6"]
    assert [one.step for one in taken] == pytest.approx([1, 2])
    # Blocks are dealt whole, and each of these splits is one.
    images = 0.001 * (300 + 500)
    assert [one.measurements for one in taken] == pytest.approx([0, images])
    assert [one.scaled for one in taken] == pytest.approx([6, 12 + images])
    cost = Cost(**json.loads((tmp_path / "cost").read_text()))
    assert cost.memory > sum(one.memory for one in taken) > 10**8
    assert (tmp_path / "output.txt").read_text() == ""


@pytest.mark.slow
def test_a_probe_of_commands_weighs_what_a_run_leaves():
    """20 s: the real commands."""
    cell = config.compose(PAIR)
    cost = probing.probe(cell, threads=None)
    path = launch.run(cell).path
    left = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert 0.7 * left < cost.disk < 1.3 * left
    assert cost.memory > 3 * 10**8
    assert cost.seconds > 1


def test_the_slowest_rank_and_the_memory_of_all_count(monkeypatch):
    monkeypatch.setattr(probing, "_peak", lambda: 5)
    monkeypatch.setattr(probing, "time", types.SimpleNamespace(perf_counter=lambda: 0.0))
    asked = []

    def say(_job, run, *, threads):
        asked.append((run.config()["epochs"], threads))
        (run.path / "checkpoint.pt").write_bytes(bytes(100_000))
        return [Taken(1.0, 20.0, 30.0, 7), Taken(2.0, 10.0, 25.0, 8)]

    monkeypatch.setattr(probing, "_of_ranks", say)
    cell = config.compose([*PAIR, "epochs=50"])
    cost = probing.probe(cell, threads=2)
    assert asked == [(10, 2)]  # the epochs of 100 steps
    assert cost.seconds == pytest.approx(-30 + 2.0 * 10 * 50 + 20.0 * 2)
    assert cost.memory == 5 + 7 + 8
    kept = sum(value.nbytes for value in worker.construct(cell).model.state_dict().values())
    assert 100_000 + kept < cost.disk < 100_000 + kept + 5_000


def test_threads_are_shared_among_ranks(monkeypatch):
    started = []

    def start(path, ranks, **how):
        started.append((ranks, how["threads"], how["command"]))
        for number in range(ranks):
            (path.parent / f"rank-{number}.json").write_text(json.dumps(asdict(Taken(1, 2, 3, 4))))

    monkeypatch.setattr(probing.agent, "start", start)
    cell = config.compose([*PAIR, "threads=null"])
    assert isinstance(probing.probe(cell, threads=6), Cost)
    assert isinstance(probing.probe(cell, threads=1), Cost)
    assert isinstance(probing.probe(cell | {"threads": 5}, threads=6), Cost)
    assert started == [(2, 3, probing.RANK), (2, 1, probing.RANK), (2, 5, probing.RANK)]


def test_why_ranks_cannot_be_probed_is_said(monkeypatch):
    def start(*_, **__):
        raise RankFailed("rank 1 of 2: killed by SIGKILL")

    monkeypatch.setattr(probing.agent, "start", start)
    cell = config.compose(PAIR)
    assert probing.probe(cell, threads=None) == "rank 1 of 2: killed by SIGKILL"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for launching in (True, False):
        elsewhere = cell | {"device": "cuda", "launch": launching}
        assert "needs a GPU of its own, and this machine has 1" in probing.probe(
            elsewhere, threads=None
        )


def test_what_is_not_known_is_not_added_up(monkeypatch, capsys):
    """Runs of as many ranks speak for each other, and no others do."""
    asked = []

    def say(cell, **_):
        asked.append((cell["world_size"], cell["nbs"]))
        return "this machine has 1" if cell["world_size"] == 2 else Cost(10.0, 10**9, 10**6)

    monkeypatch.setattr(forecast, "probe", say)
    monkeypatch.setattr(forecast, "warm_up", lambda _: None)
    words = [*PAIR[1:3], "norm=bn", "world_size=1,2", "nbs=2,4,8,16,32", "seed=100", *PAIR[6:]]
    assert forecast.main("nbs", words) == 0
    said = capsys.readouterr().out
    assert {size for size, _ in asked} == {1, 2}
    assert "to do: 5 cells, " in said
    assert "?: 5 cells cannot be probed here: this machine has 1\n" in said
    for line in said.splitlines():
        if " missing " in line:
            assert ("?" in line) == ("world_size=2" in line)
            assert ("1.0 GB" in line) == ("world_size=1" in line)
