"""The command line: what each command answers, its exit codes, and what it imports to do so."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from compositions import composed

from normlab import __version__, app, cli, config, experiment, launch, outcome, probes, show
from normlab.plugins import package_dir
from normlab.runs import table

SMALL = ["data=synthetic", "data.n=64", "batch_size=16", "epochs=1", "evals=[val:ema]"]


@pytest.fixture(autouse=True)
def _scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*argv: str, capture: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = cli.main(list(argv))
    out, err = capture.readouterr()
    return code, out, err


# -- without Hydra --------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["show"], ["report", "--help"]])
def test_a_quick_answer_imports_nothing_heavy(argv: list[str]) -> None:
    heavy = {"torch", "hydra", "pandas", "numpy", "matplotlib"}
    code = (
        f"import sys; from normlab.cli import main; main({argv!r}); "
        f"print(sorted({heavy!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert len(done.stdout.splitlines()) > 1


def test_help_lists_every_command(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = run("--help", capture=capfd)
    assert (code, err) == (0, "")
    for command in cli.COMMANDS:
        assert f"\n  {command} " in out
    code, out, err = run(capture=capfd)
    assert (code, out) == (2, "")
    assert "usage: normlab" in err


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_has_help(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(command, "--help", capture=capfd)
    assert (code, err) == (0, "")
    assert len(out.splitlines()) > 3


def test_version(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("--version", capture=capfd) == (0, f"normlab {__version__}\n", "")


@pytest.mark.parametrize("what", sorted(show.TABLES))
def test_show_lists_what_there_is(what: str, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("show", what, capture=capfd)
    assert code == 0
    groups = {
        many: many[:-1] for many in ("norms", "convs", "models", "recipes", "scales", "tasks")
    }
    named = {"runs": ["id"], "probes": probes.names(), "protocols": ["precise_mean"]}
    for name in named.get(what) or config.options(
        "data" if what == "data" else groups.get(what, "experiment")
    ):
        assert name in out
    assert all(len(line) <= 110 for line in out.splitlines())


def test_plan_prints_the_batch_plan(capfd: pytest.CaptureFixture[str]) -> None:
    # More ranks than can run yet can be planned.
    code, out, _ = run("plan", "batch_size=1024", "nbs=32", "world_size=8", capture=capfd)
    assert code == 0
    table = dict(line.split()[:2] for line in out.splitlines())
    assert table == {
        "norm": "bn",
        "batch_size": "1024",
        "world_size": "8",
        "accumulation": "4",
        "micro_batch": "32",
        "nbs": "32",
    }


def test_plan_tells_of_each_arm(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("plan", "experiment=renorm", "arm=br-4,gn", "lr=1", capture=capfd)
    assert code == 0
    blocks = [dict(line.split()[:2] for line in b.splitlines()) for b in out.split("\n\n")]
    assert [(b["arm"], b["norm"], b["nbs"]) for b in blocks] == [
        ("br-4", "renorm", "4"),
        ("gn", "gn", "-"),
    ]
    code, out, _ = run("plan", "experiment=nbs_forms", "lr=1", capture=capfd)
    assert code == 0
    told = [line.split()[1] for line in out.splitlines() if line.startswith("arm ")]
    assert told == list(experiment.load("nbs_forms").scale("demo").arms)
    code, out, _ = run("plan", "experiment=nbs", "nbs=8", capture=capfd)
    assert code == 0
    assert not out.startswith("arm")


# -- Hydra ----------------------------------------------------------------------------------------


def test_cfg_prints_the_config_and_writes_nothing(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, out, err = run("train", "--cfg", "job", "--resolve", "norm=gn", capture=capfd)
    assert (code, err) == (0, "")
    assert "name: gn" in out
    assert "${" not in out
    code, out, _ = run("sweep", "nbs", "scale=desk", "--cfg", "job", capture=capfd)
    assert code == 0
    assert "experiment: nbs" in out
    assert "scale: desk" in out
    # In a process of its own: Hydra turns its debugging messages on and leaves them on.
    command = [sys.executable, "-m", "normlab", "train", "--info", "searchpath", "nbs=4"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert str(package_dir("conf")) in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_help_of_train_is_ours(capfd: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run("train", "--help", capture=capfd)
    for group in ("norm: bn, ", "scale: demo", f"experiment: {experiment.names()[0]}"):
        assert group in out
    assert "Powered by Hydra" not in out


def test_flags_may_stand_anywhere(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = recorded(monkeypatch)
    for line in ("-m nbs=2,4 seed=0", "nbs=2,4 -m seed=0", "nbs=2,4 seed=0 --multirun"):
        code, out, err = run("train", *line.split(), capture=capfd)
        assert (code, err) == (0, "")
        assert "2 cells: 2 done (2 run, 0 skipped), 0 diverged, 0 failed, 0 refused" in out
    assert [c["nbs"] for c in seen] == [2, 4] * 3


def recorded(monkeypatch: pytest.MonkeyPatch, **fate: str) -> list[dict]:
    """Replace the run by a record of its config; fate: what becomes of the runs of a seed."""
    seen: list[dict] = []

    def pretend(run: dict, _named: list[str]) -> outcome.Outcome:
        seen.append(run)
        what = fate.get(f"seed{run['seed']}", "done")
        identity = f"run-{run['seed']}"
        if what == "failed":
            raise launch.JobError(f"{identity} failed: RuntimeError: boom (log: log.txt)")
        if what == "refused":
            raise ValueError(f"seed={run['seed']} is refused")
        if what == "bug":
            raise TypeError("a bug")
        status = "diverged" if what == "diverged" else "done"
        lacking = f"{identity} has lost its youth" if "lacking" in what else ""
        return outcome.Outcome(
            identity, status, "skipped" in what, Path("runs") / identity, {"val:ema": 12.5}, lacking
        )

    monkeypatch.setattr(launch, "run", pretend)
    return seen


def test_a_sweep_runs_the_experiments_grid(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = recorded(monkeypatch)
    code, out, _ = run("sweep", "nbs", "scale=desk", "seed=100", capture=capfd)
    assert code == 0
    assert out.splitlines()[-1].startswith("7 cells: 7 done")
    assert {(c["nbs"], c["seed"]) for c in seen} == {
        (nbs, 100) for nbs in (2, 4, 8, 16, 32, 64, 128)
    }
    assert {(c["scale"], c["experiment"], c["norm"]["name"]) for c in seen} == {
        ("desk", "nbs", "ghost")
    }


def test_every_experiment_sweeps_what_its_cells_say(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in experiment.names():
        loaded = experiment.load(name)
        for scale in loaded.scales:
            seen = recorded(monkeypatch)
            first = loaded.cells(scale)[0]
            axes = [f"{key}={value}" for key, value in first.axes.items()]
            assert cli.main(["sweep", name, f"scale={scale}", *axes]) == 0
            (ran,) = seen
            expected = composed(*first.overrides)
            assert config.cell_key(ran) == config.cell_key(expected)


def test_the_summary_and_the_exit_code_of_a_sweep(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded(monkeypatch, seed1="failed", seed2="diverged", seed3="skipped")
    code, out, err = run("train", "-m", "seed=0,1,2,3", capture=capfd)
    assert code == 1
    assert "4 cells: 2 done (1 run, 1 skipped), 1 diverged, 1 failed, 0 refused" in out
    assert "run-3  skipped" in out
    assert "run-1 failed: RuntimeError: boom" in err
    assert "run-2 diverged" in err

    recorded(monkeypatch, seed1="refused")
    code, out, err = run("train", "-m", "seed=0,1,2", capture=capfd)
    assert code == 1  # the other cells ran
    assert "3 cells: 2 done (2 run, 0 skipped), 0 diverged, 0 failed, 1 refused" in out
    assert err == "normlab: seed=1 is refused\n"

    recorded(monkeypatch, seed0="skipped", seed1="lacking")
    code, out, err = run("train", "-m", "seed=0,1", capture=capfd)
    assert code == 1  # what could be made was made
    assert "2 cells: 2 done (1 run, 1 skipped), 0 diverged, 0 failed, 0 refused; 1 of the " in out
    assert err == "normlab: run-1 has lost its youth\n"
    recorded(monkeypatch, seed0="skipped", seed1="lacking skipped")
    assert run("train", "-m", "seed=0,1", capture=capfd)[0] == 2

    for other, expected in (("skipped", 2), ("failed", 1), ("diverged", 1)):
        recorded(monkeypatch, seed0=other, seed1="refused")
        assert run("train", "-m", "seed=0,1", capture=capfd)[0] == expected

    recorded(monkeypatch, **{f"seed{n}": "refused" for n in range(6)})
    code, _, err = run("train", "-m", "seed=0,1,2,3,4,5", capture=capfd)
    assert code == 2
    assert len(err.splitlines()) == 5
    assert "and 2 more" in err


@pytest.mark.parametrize(("fate", "code"), [("failed", 1), ("diverged", 1), ("refused", 2)])
def test_the_exit_code_of_a_run(
    fate: str, code: int, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded(monkeypatch, seed0=fate)
    got, _, err = run("train", capture=capfd)
    assert got == code
    assert err.startswith("normlab: ")
    assert len(err.splitlines()) == 1


def test_a_bug_is_not_taken_for_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded(monkeypatch, seed0="bug")
    with pytest.raises(TypeError, match="a bug"):
        cli.main(["train"])


def test_a_refusal_shows_where_it_comes_from_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMLAB_TRACEBACK", "1")
    recorded(monkeypatch, seed0="refused")
    with pytest.raises(ValueError, match="seed=0 is refused"):
        cli.main(["train"])
    with pytest.raises(ValueError, match="no command"):
        cli.main(["tran"])


def test_ctrl_c_is_130(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "run", interrupted)
    code, _, err = run("train", capture=capfd)
    assert (code, err) == (130, "normlab: interrupted\n")


def test_sigterm_is_143(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def terminated(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(launch, "run", terminated)
    assert cli.main(["train"]) == 143
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_missing_launcher_says_what_to_install() -> None:
    from hydra.errors import MissingConfigException

    with (
        pytest.raises(config.ConfigError, match=r"pip install 'normlab\[joblib\]'"),
        config.explained(),
    ):
        raise MissingConfigException("In 'x': Could not find 'hydra/launcher/joblib'\n")


def test_files_are_named_with_what_is_wrong() -> None:
    assert app.in_words(PermissionError(13, "Permission denied", "runs/x")) == (
        "runs/x: Permission denied"
    )
    assert app.in_words(ValueError()) == "ValueError"


# -- real runs ------------------------------------------------------------------------------------


def test_a_run_then_skipped_then_evaluated(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, out, _ = run("train", *SMALL, capture=capfd)
    assert code == 0
    (directory,) = (tmp_path / "runs").iterdir()
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]  # nothing of Hydra's
    said = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert said["run"] == directory.name
    assert said["status"] == "done"
    assert said["directory"] == f"runs/{directory.name}"
    assert said["val:ema"].endswith("% error")

    code, out, _ = run("train", *SMALL, capture=capfd)
    assert code == 0
    assert "done, skipped" in out

    code, out, _ = run("eval", directory.name[:-4], "test:precise/samples:32", capture=capfd)
    assert code == 0
    assert "test:precise/samples:32" in out

    code, out, _ = run("show", "runs", capture=capfd)
    assert directory.name in out

    # What the repository's record holds is shown from there.
    (tmp_path / "results" / "nbs").mkdir(parents=True)
    table(tmp_path / "runs").to_csv(tmp_path / "results" / "nbs" / "runs.csv", index=False)
    launch._committed.cache_clear()
    code, out, err = run("train", *SMALL, "runs=elsewhere", capture=capfd)
    assert (code, err) == (0, "")
    assert "directory                recorded in results/nbs/runs.csv; skip_done=local runs" in out
    assert " % error" in out
    (tmp_path / "elsewhere").mkdir()
    code, _, err = run("eval", directory.name, "val:batch", "--runs", "elsewhere", capture=capfd)
    assert code == 2
    assert "recorded in results/nbs/runs.csv without its weights: skip_done=local runs" in err
    launch._committed.cache_clear()


def test_a_sweep_two_at_a_time(tmp_path: Path) -> None:
    """In a process of its own, as the workers of joblib outlive the sweep."""
    command = [sys.executable, "-m", "normlab", "train", "-m", *SMALL, "seed=0,1"]
    done = subprocess.run(
        [*command, "hydra/launcher=joblib"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == (
        "2 cells: 2 done (2 run, 0 skipped), 0 diverged, 0 failed, 0 refused"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert len(list((tmp_path / "runs").iterdir())) == 2


# -- shell completion -----------------------------------------------------------------------------


def completed(line: str, capture: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> str:
    patch.setenv("COMP_LINE", line)
    code, out, _ = run("-sc", "query=bash", capture=capture)
    assert code == 0
    return out


def test_completion(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = run("-sc", "install=bash", capture=capfd)
    assert code == 0
    assert "complete" in out
    assert completed("normlab tr", capfd, monkeypatch).split() == list(cli.COMMANDS)
    assert completed("normlab train norm=g", capfd, monkeypatch).split() == [
        "norm=ghost",
        "norm=gn",
    ]
    assert "experiment=nbs" in completed("normlab train experiment=", capfd, monkeypatch)
    known = experiment.names()
    assert completed("normlab report n", capfd, monkeypatch).split() == known
    assert completed("normlab sweep ", capfd, monkeypatch).split() == known
    assert completed("normlab sweep nbs scale=d", capfd, monkeypatch).split() == [
        "scale=demo",
        "scale=desk",
    ]
    assert completed("normlab show n", capfd, monkeypatch) == ""
