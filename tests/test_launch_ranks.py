"""A run over ranks from its config on: started here, prepared for elsewhere, or refused."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import agents
import pytest
import torch
from faults import identical

from normlab import build, cli, config, launch, runs, worker
from normlab.config import ConfigError

JOB = ["data=synthetic", "data.n=128", "batch_size=32", "norm=sync", "nbs=32", "world_size=2",
       "epochs=2", "eval_last=2", "threads=1", "device=cpu",
       "evals=[val:ema,val:batch]"]  # fmt: skip
NODES = "torch.distributed.run"
STALL = 40


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def normlab(*arguments, timeout=180):
    command = [sys.executable, "-m", "normlab", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def only_run():
    (run,) = runs.listed(Path("runs"))
    return run


def test_two_ranks_make_one_run():
    done = normlab("train", *JOB)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert [path.name for path in Path.cwd().iterdir()] == ["runs"]
    run = only_run()
    assert {path.name for path in run.path.iterdir()} - {".lease.1", "ranks"} == {
        "config.yaml", "env.json", "metrics.csv", "evals.csv", "checkpoint.pt", "epoch-1.pt",
        "log.txt", "status.json",
    }  # fmt: skip
    assert run.status()["status"] == "done"
    env = run.env()
    assert (env["world_size"], env["backend"], env["threads"]) == (2, "gloo", 1)
    assert len(run.evals()) == 4
    # A rank tells its own log what it does; the run's log has it from the first one, once.
    (logs,) = run.path.glob("ranks/*/attempt_0")
    told = [(logs / str(rank) / "stderr.log").read_text().count("epoch 2, ") for rank in (0, 1)]
    assert told == [2, 2]
    assert run.log.read_text().count("epoch 2, ") == 2
    # What it lacks, one process makes of its checkpoint.
    later = launch.evaluate(run.id, ["test:ema"], root="runs")
    assert set(later.summary) == {"val:ema", "val:batch", "test:ema"}


def test_a_prepared_run_waits_for_its_ranks(capfd):
    assert cli.main(["train", *JOB, "launch=false", "max_restarts=3"]) == 0
    run = only_run()
    said, path = capfd.readouterr().out, run.path.resolve()
    assert "status     prepared\n" in said
    assert "torchrun --nnodes=$NODES --nproc-per-node=$((2 / NODES)) " in said
    assert f" --max-restarts=3 --log-dir={path}/ranks " in said
    assert said.endswith(f" -m normlab.worker {path}\n")
    assert {path.name for path in run.path.iterdir()} - {".lease.1"} == {
        "config.yaml", "env.json", "log.txt",
    }  # fmt: skip
    assert cli.main(["train", "-m", *JOB, "seed=0,1", "launch=false"]) == 0
    said = capfd.readouterr().out
    assert said.count("  prepared  torchrun ") == 2
    assert said.endswith("2 cells: 0 done (0 run, 0 skipped), 0 diverged, 0 failed, 0 refused, "
                         "2 prepared\n")  # fmt: skip


def test_ranks_read_what_was_asked_for_this_time():
    alone = [*JOB, "world_size=1"]
    run = runs.RunDir(launch.run(config.compose(alone)).path)
    run.clear_status()
    more = ["launch=false", "stall_timeout=77", "evals=[val:ema,val:batch,test:ema]"]
    assert launch.run(config.compose([*alone, *more])).status == "prepared"
    assert run.config()["stall_timeout"] == 77
    assert run.config()["evals"] == ["val:ema", "val:batch", "test:ema"]


def contents(run):
    return {path: path.read_bytes() for path in run.path.iterdir() if path.is_file()}


def test_another_number_of_ranks_is_refused(monkeypatch):
    launch.run(config.compose([*JOB, "launch=false"]))
    run = only_run()
    before = contents(run)
    with pytest.raises(ValueError, match="has world_size=2, and 1 ranks were started"):
        worker.main(str(run.path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    (run.path / "env.json").unlink()
    with pytest.raises(ValueError, match=r"is not prepared: normlab train .* launch=false"):
        worker.main(str(run.path))
    with pytest.raises(ValueError, match=r"it has no config\.yaml"):
        worker.main("elsewhere")
    Path("foreign").mkdir()
    Path("foreign/config.yaml").write_text("model: tiny\n")
    with pytest.raises(ValueError, match=r"foreign is no run: its config\.yaml lacks norm, data"):
        worker.main("foreign")
    assert contents(run).items() < before.items()


def test_a_finished_run_is_not_begun_again(monkeypatch):
    launch.run(config.compose([*JOB, "launch=false"]))
    run = only_run()
    run.write_status({"status": "done"})
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(worker, "_take_part", lambda *_: pytest.fail("began again"))
    worker.main(str(run.path))


def test_normlab_under_torchrun_is_refused(monkeypatch, capfd):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    for command in (["train", *JOB], ["sweep", "nbs"]):
        assert cli.main(command) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert "launch=false says how" in line
    assert list(Path.cwd().iterdir()) == []


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    gpu = config.compose([*JOB, "device=cuda"])
    with pytest.raises(ValueError, match=r"world_size=2: each rank needs a GPU .* has 1 "):
        build.check_gpus(gpu)
    build.check_gpus(gpu | {"launch": False})
    build.check_gpus(gpu | {"device": "cpu"})
    build.check_gpus(gpu | {"world_size": 1})


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("max_restarts=-1", "max_restarts must be at least 0"),
        ("stall_timeout=0", r"stall_timeout must be at least 1 and below 1e\+06"),
        ("stall_timeout=inf", r"stall_timeout must be at least 1 and below 1e\+06"),
    ],
)
def test_keys_of_ranks_that_make_no_sense_are_refused(override, says):
    with pytest.raises(ConfigError, match=says):
        config.check(config.compose([*JOB, override]))


def test_how_ranks_are_kept_is_no_part_of_what_a_run_is():
    def named(*overrides):
        composed = config.compose([*JOB, *overrides])
        return config.run_id(composed, device="cpu", data_digest="", kernels=False)

    assert named() == named("launch=false", "max_restarts=2", "stall_timeout=5")
    assert named() != named("world_size=1", "batch_size=32")


def test_the_failure_of_a_job_crosses_processes():
    error = pickle.loads(pickle.dumps(launch.JobError("run failed: rank 1 of 2: killed")))
    assert str(error) == "run failed: rank 1 of 2: killed"


@pytest.mark.slow
def test_torchrun_on_two_machines_makes_the_same_run():
    """Both machines are this one, each with one rank. Its probes it makes as its log says."""
    job = [*JOB, "probes=[ema_trace]"]
    normlab("train", *job, "runs=here")
    prepared = launch.run(config.compose([*job, "launch=false"]))
    line = prepared.command.replace("torchrun", f"{sys.executable} -m {NODES}", 1)
    environment = os.environ | {"NODES": "2", "HOST": "localhost", "OMP_NUM_THREADS": "1"}
    machines = [
        subprocess.Popen(["sh", "-c", line], env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for machine in machines:
        _, said = machine.communicate(timeout=300)
        assert machine.returncode == 0, said
    run, other = only_run(), runs.RunDir(Path("here") / prepared.id)
    assert run.status()["status"] == "done"
    assert json.loads((run.path / "env.json").read_text())["ended"]
    (command,) = re.findall(r"ema_trace\): normlab (.*)", run.log.read_text())
    done = normlab(*command.split())
    assert done.returncode == 0, done.stderr
    assert run.probes() == other.probes() != []
    assert identical(run.path, other.path)


@pytest.mark.slow
def test_a_sweep_of_runs_over_ranks_side_by_side():
    workers = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    done = normlab("train", "-m", *JOB, "seed=0,1", *workers, timeout=400)
    assert done.returncode == 0, done.stderr
    assert "2 cells: 2 done (2 run" in done.stdout
    assert len(runs.listed(Path("runs"))) == 2


def ranks_of(pid):
    """The pids of a process's children that are ranks, by rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/status"):
        with suppress(FileNotFoundError, ProcessLookupError):
            if f"\nPPid:\t{pid}\n" in path.read_text():
                for entry in (path.parent / "environ").read_bytes().split(b"\0"):
                    if entry.startswith(b"RANK="):
                        found[int(entry[5:])] = int(path.parent.name)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "number", "code", "says"),
    [
        ("parent", signal.SIGINT, 130, "normlab: interrupted"),
        ("parent", signal.SIGTERM, 143, ""),
        ("parent", signal.SIGKILL, -signal.SIGKILL, ""),
        (0, signal.SIGKILL, 1, "failed: rank 0 of 2: killed by SIGKILL"),
        (1, signal.SIGKILL, 1, "failed: rank 1 of 2: killed by SIGKILL"),
        (1, signal.SIGSTOP, 1, "failed: rank 0 of 2: Stalled: rank 1 has stalled"),
    ],
)
def test_the_command_ends_with_all_its_ranks(victim, number, code, says):
    """The real processes, from the command line down.

    On a busy machine two ranks may come many seconds apart, and stand still for some: only the
    case that waits for a stall has a timeout that it can reach, and that is far above these.
    """
    timeout = STALL if number == signal.SIGSTOP else 600
    keys = ["epochs=100000", f"stall_timeout={timeout}"]
    command = [sys.executable, "-m", "normlab", "train", *JOB, *keys]
    with Path("said").open("w") as said:
        process = subprocess.Popen(command, stderr=said)
    agents.wait_for(
        lambda: process.poll() is not None or list(Path().glob("runs/*/metrics.csv")), 300
    )
    ranks = ranks_of(process.pid)
    assert sorted(ranks) == [0, 1]
    os.kill(ranks.get(victim, process.pid), number)
    assert process.wait(60 + (STALL if number == signal.SIGSTOP else 0)) == code
    agents.wait_for(lambda: all(map(agents.gone, ranks.values())), 30)
    assert re.search(says, Path("said").read_text())
    assert only_run().status().get("status") == ("failed" if code == 1 else None)
    if code in (130, 143):
        assert (only_run().path / "checkpoint.pt").exists()
