"""Runs of weights that are trained already: measured, resumed, known by the weights."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from compositions import composed

from normlab import agenda, app, checkpoint, config, experiment, forecast, launch, worker
from normlab.runs import RunDir

EVALS = "evals=[test:ema,test:precise,test:precise/shift:contrast-3,test:adapted/shift:contrast-3]"
SMALL = ("data=digits", "model=tiny", "norm=ghost", "nbs=32", "device=cpu", "threads=1", EVALS)

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A network trained for two epochs, with its evaluations."""
    root = tmp_path_factory.mktemp("trained")
    words = ("scale=demo", *SMALL, "epochs=2", "seed=100", f"runs={root}", "skip_done=local")
    return RunDir(launch.run(composed(*words)).path)


def asked(weights: Path, *overrides: str) -> dict[str, Any]:
    # The layout of the training, so that the last bits are the same.
    words = ("scale=pretrained", *SMALL, "channels_last=false", "seed=100", f"init_from={weights}")
    return composed(*words, *overrides)


def errors(run: RunDir) -> dict[str, tuple[str, str]]:
    return {row["protocol"]: (row["error"], row["loss"]) for row in run.evals()}


def test_the_numbers_are_those_of_the_run_that_trained(trained: RunDir) -> None:
    outcome = launch.run(asked(trained.checkpoint))
    run = RunDir(outcome.path)
    assert errors(run) == errors(trained)
    assert (run.status()["status"], {row["epoch"] for row in run.evals()}) == ("done", {"0"})
    assert run.metrics() == []
    again = launch.run(asked(trained.checkpoint))
    assert (again.id, again.skipped) == (run.id, True)


def test_a_run_is_known_by_the_weights_and_not_by_their_path(
    trained: RunDir, tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere.pth"
    shutil.copy(trained.checkpoint, moved)
    one, other = (launch.identified(asked(at)) for at in (trained.checkpoint, moved))
    assert launch.directory_of(one).id == launch.directory_of(other).id
    assert one["weights"] == other["weights"]
    named = f"tiny@{one['weights'][:8]}-ghost-nbs32-s100-"
    assert launch.directory_of(one).id.startswith(named)
    state = checkpoint.load(moved)
    next(iter(state["model"].values())).add_(1)
    checkpoint.save(moved, state)
    assert launch.directory_of(launch.identified(asked(moved))).id != launch.directory_of(one).id


def test_without_the_file_a_finished_run_is_evaluated_further(
    trained: RunDir, tmp_path: Path
) -> None:
    weights = tmp_path / "mine.pth"
    shutil.copy(trained.checkpoint, weights)
    run = RunDir(launch.run(asked(weights)).path)
    weights.unlink()
    launch.evaluate(run.id, ["test:precise_layerwise"], root="runs")
    assert "test:precise_layerwise" in errors(run)


def test_what_was_measured_outlives_a_kill(
    trained: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, made = asked(trained.checkpoint), worker.Evaluator.run

    def killed(self: worker.Evaluator, protocol: Any) -> dict[str, Any]:
        if protocol.statistics == "adapted":
            raise KeyboardInterrupt
        return made(self, protocol)

    monkeypatch.setattr(worker.Evaluator, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        launch.run(full)
    (path,) = Path("runs").iterdir()
    assert len(RunDir(path).evals()) == 3
    counted = []
    monkeypatch.setattr(
        worker.Evaluator, "run", lambda self, one: counted.append(str(one)) or made(self, one)
    )
    launch.run(full)
    assert counted == ["test:adapted/shift:contrast-3"]
    assert errors(RunDir(path)) == errors(trained)


def test_training_begins_with_given_weights(trained: RunDir) -> None:
    full = asked(trained.checkpoint, "epochs=1", "eval_at=[0]")
    run = RunDir(launch.run(full).path)
    before = {r["protocol"]: r["error"] for r in run.evals() if r["epoch"] == "0"}
    assert before == {protocol: error for protocol, (error, _) in errors(trained).items()}
    assert len(run.metrics()) == 1


def test_weights_that_do_not_fit_are_refused_before_anything_is_written(trained: RunDir) -> None:
    for wrong, said in (
        ("model=resnet8", "is of another network: it lacks"),
        ("weights=0123456789abcdef", "and not weights=0123456789abcdef"),
        ("evals=[test:ema,test:precise/samples:5000]", "train has 997 images"),
    ):
        with pytest.raises(ValueError, match=said):
            launch.run(asked(trained.checkpoint, wrong))
    assert not Path("runs").exists()


def test_a_task_takes_no_weights() -> None:
    full = composed("task=conventions", "init_from=any.pth")
    with pytest.raises(config.ConfigError, match="init_from: task=conventions does not take it"):
        config.check_taken(full, ["task", "init_from"])


# -- the experiments ------------------------------------------------------------------------------

GIVEN = [name for name in experiment.names() if "pretrained" in experiment.load(name).scales]


def test_three_experiments_need_no_training() -> None:
    assert GIVEN == ["domain_shift", "precise_batch", "precise_samples"]


@pytest.mark.parametrize("name", GIVEN)
def test_an_experiment_measures_what_it_does_on_imagenet(name: str) -> None:
    """The columns of the scale that trains on ImageNet, on torchvision's network and images."""
    loaded = experiment.load(name)
    assert loaded.evals("pretrained") == loaded.evals("paper")
    for cell in loaded.cells("pretrained")[:1]:
        full = composed(*cell.overrides, "init_from=any.pth")
        config.check(full | {"evals": loaded.evals("pretrained")})
        assert (full["epochs"], full["model"]["depth"]) == (0, 50)
        assert (full["data"]["name"], full["data"]["size"]) == ("imagenet_val", 224)
        assert config.plan_of(full).nbs == 32
        assert agenda.epochs(full) == [0]


def test_experiments_share_their_runs() -> None:
    keys = {
        config.cell_key(composed(*cell.overrides, "init_from=any.pth"))
        for name in GIVEN
        for cell in experiment.load(name).cells("pretrained")
    }
    assert len(keys) == 1


def test_a_dry_run_says_what_measuring_takes(
    trained: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["scale=pretrained", *SMALL[:2], *SMALL[4:], "seed=100,101"]
    assert forecast.main("precise_samples", [*words, f"init_from={trained.checkpoint}"]) == 0
    said = capsys.readouterr().out
    assert "2 cells: 2 missing" in said
    assert "tiny@" in said
    assert not Path("runs").exists()


def test_a_sweep_without_weights_says_which_key_names_them(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert app.sweep(["domain_shift", "scale=pretrained", "seed=100"]) == 2
    assert "epochs=0 trains nothing: init_from=<file> names the weights" in capfd.readouterr().err
