"""One sweep on each engine: it runs every cell, a failed one stops no other, nothing listens to the
outside. Ray has an environment of its own, which `make test` makes."""

import errno
import os
import secrets
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import listening
import pytest

from normlab import build, cli, config, engines, launch, runs, worker

ROOT = Path(__file__).resolve().parent.parent
RAY = Path(os.environ.get("NORMLAB_RAY", ROOT / ".venv-ray" / "bin" / "python"))
SEEDS = range(4)
BAD = 1
PATIENCE = 400.0
CELL = ["norm=ghost", "nbs=8", "epochs=2", "eval_last=2", "evals=[val:ema]", "data.subset=640",
        "threads=1", "device=cpu", "allocator=system"]  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def python(engine: str) -> str:
    if engine != "ray":
        return sys.executable
    if not RAY.exists() and "NORMLAB_RAY" not in os.environ:
        pytest.skip("Ray has an environment of its own: make .venv-ray/.ready")
    return str(RAY)


def run_id(seed: int) -> str:
    composed = config.compose([*CELL, f"seed={seed}"])
    digest = build.data(composed).digest
    return config.run_id(composed, device="cpu", data_digest=digest, kernels=False)


def spoil(seed: int, monkeypatch) -> None:
    """Leave a run half done, and a directory where its metrics go: to continue it will fail."""
    train = worker.Trainer.train_epoch
    with monkeypatch.context() as patch:
        patch.setattr(worker.Trainer, "train_epoch", lambda t: train(t) if t.epoch == 0 else 1 / 0)
        with pytest.raises(launch.JobError):
            launch.run(config.compose([*CELL, f"seed={seed}"]))
    metrics = Path("runs", run_id(seed), "metrics.csv")
    metrics.unlink()
    metrics.mkdir()


@pytest.mark.parametrize("engine", ["basic", "joblib", "submitit_local", "ray"])
def test_a_sweep_on_an_engine(engine, monkeypatch):
    interpreter = python(engine)
    spoil(BAD, monkeypatch)
    mark = secrets.token_hex(8)
    sweep = subprocess.Popen(
        [interpreter, "-m", "normlab", "train", "-m", *CELL, f"seed={','.join(map(str, SEEDS))}",
         f"hydra/launcher={engine}"],
        env=os.environ | {"NORMLAB_MARK": mark, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    listened = listening.watched(sweep, mark, PATIENCE)
    out, err = sweep.communicate(timeout=10)
    assert sweep.returncode == 1, err
    last = out.strip().splitlines()
    assert "4 cells: 3 done (3 run, 0 skipped), 0 diverged, 1 failed, 0 refused" in last, err
    assert f"normlab: {run_id(BAD)} failed: IsADirectoryError" in err
    found = {run.id: run for run in runs.listed(Path("runs"))}
    assert set(found) == {run_id(seed) for seed in SEEDS}
    for seed in SEEDS:
        run = found[run_id(seed)]
        assert run.status()["status"] == ("failed" if seed == BAD else "done")
        assert len(run.evals()) == (1 if seed == BAD else 2)
        assert run.env()["source"] == runs.source_digest()
    assert all(map(listening.is_loopback, listened)), listened
    assert bool(listened) == (engine == "ray")


def test_ray_is_prepared_for_one_machine_and_a_named_cluster_is_left_alone(monkeypatch):
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    before = dict(os.environ)
    for words in (["hydra/launcher=joblib"], [], RAY_CLUSTER):
        with engines.prepared(words) as more:
            assert (more, os.environ) == ([], before)
    with engines.prepared(["hydra/launcher=ray"]) as more:
        assert more == ["++hydra.launcher.ray.init.include_dashboard=false"]
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
        assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    assert os.environ == before
    wanted = "+hydra.launcher.ray.init.include_dashboard=true"
    with engines.prepared(["hydra/launcher=ray", wanted]) as more:
        assert more == []
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with engines.prepared(["hydra/launcher=ray"]) as more:
        assert (more, "RAY_AUTH_TOKEN" in os.environ) == ([], False)


RAY_CLUSTER = ["hydra/launcher=ray", "hydra.launcher.ray.init.address=ray://head:10001"]


def test_notes_lie_where_the_jobs_of_other_machines_see_them():
    with engines.scratch(["hydra/launcher=joblib"]) as place:
        assert place.is_dir()
    assert not place.exists()
    for engine in ("submitit_slurm", "submitit_local", "ray"):
        with (
            engines.scratch([f"hydra/launcher={engine}", "runs=there"]) as one,
            engines.scratch([f"hydra/launcher={engine}", "runs=there"]) as other,
        ):
            assert one.parent == other.parent == Path("there/.sweep").resolve()
            assert one != other
    with engines.scratch(["hydra/launcher=ray", "hydra.sweep.dir=here"]) as given:
        assert given.parent == Path("here").resolve()
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["hydra/launcher=ray"], False),
        (["hydra/launcher=submitit_local"], True),
        (["hydra/launcher=ray", "hydra.sweep.dir=here"], True),
    ],
)
def test_what_jobs_have_not_begun_to_write_to_is_removed(words, kept):
    """With what was made for it, and nothing that was there."""
    Path("runs").mkdir()
    for begun in (False, True):
        with engines.scratch(words) as place:
            engines.leave(place, 0, {})
            if begun:
                (place / "0").mkdir()
        assert place.exists() == (begun and kept)
        assert place.parent.exists() == (begun and kept)
    assert Path("runs").exists()


def test_each_job_has_a_note_of_its_own(tmp_path):
    """In their order; a job that is run again replaces what it has noted."""
    for job, status in ((10, "done"), (2, "failed"), (0, "done"), (2, "done")):
        engines.leave(tmp_path / "notes", job, {"job": job, "status": status})
    assert len(list((tmp_path / "notes").iterdir())) == 3
    assert engines.notes(tmp_path / "notes") == [
        {"job": job, "status": "done"} for job in (0, 2, 10)
    ]
    assert engines.notes(tmp_path / "nowhere") == []


@pytest.mark.parametrize("axis", ["seed=0,1", "seed=1"])
def test_a_job_without_a_note_is_said(axis, monkeypatch, capsys):
    leave = engines.leave

    def full(place, job, note):
        if job == len(axis.split(",")) - 1:
            raise OSError(errno.ENOSPC, "No space left on device", str(place))
        leave(place, job, note)

    monkeypatch.setattr(engines, "leave", full)
    words = ["-m", axis] if "," in axis else [axis]
    assert cli.main(["train", *words, *CELL, "epochs=1", "eval_last=1"]) == 1
    said = capsys.readouterr().err
    assert "normlab: no note of this job: " in said
    jobs = len(axis.split(","))
    assert f"normlab: 1 of {jobs} jobs left no note of what became of them" in said
    assert len(runs.listed(Path("runs"))) == jobs


def test_slurm_is_refused_where_there_is_none(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with (
        pytest.raises(ValueError, match=r"submitit_slurm needs SLURM's srun.*submitit_local"),
        engines.prepared(["hydra/launcher=submitit_slurm"]),
    ):
        pass


def holders(path: Path) -> list[int]:
    """The processes that have a file open."""
    found = []
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):  # another's, or gone by now
            found += [int(descriptor.parts[2])] if descriptor.readlink() == path else []
    return found


@pytest.mark.slow
def test_a_job_that_is_killed_is_said_and_the_sweep_has_failed():
    """joblib gives up when one of its workers dies."""
    words = ["train", "-m", *CELL, "epochs=2000", "seed=0,1", "hydra/launcher=joblib"]
    sweep = subprocess.Popen(
        [sys.executable, "-m", "normlab", *words], stderr=subprocess.PIPE, text=True
    )
    until = time.monotonic() + PATIENCE
    while not (held := list(Path("runs").glob("*-s0-*/.lease.*/holder"))):
        assert time.monotonic() < until
        time.sleep(0.1)
    (worker,) = holders(held[0].resolve())
    os.kill(worker, signal.SIGKILL)
    _, err = sweep.communicate(timeout=PATIENCE)
    assert sweep.returncode == 1
    assert "joblib gave up (TerminatedWorkerError" in err
    assert "Traceback" not in err
    assert "normlab: the same command resumes what is not finished" in err
