"""A run goes on with other ranks where its batches stay what they are, and nowhere else."""

import copy
import json
import signal
from pathlib import Path

import pytest
import torch
import whole

from normlab import checkpoint, cli, launch, runs
from normlab.config import (
    ConfigError,
    check_resume,
    compose,
    continued,
    keys,
    other_statistics,
    plan_of,
)
from normlab.runs import RunDir


def recorded(*overrides):
    return compose(["batch_size=64", *overrides])


@pytest.mark.parametrize(
    ("run", "size", "formed"),
    [
        # what the run is, how many ranks go on, their micro-batch and how many of them per step
        (["norm=bn", "nbs=16"], 2, (16, 2)),
        (["norm=bn", "nbs=16", "world_size=4"], 1, (16, 4)),
        (["norm=bn", "world_size=4"], 2, (16, 2)),
        (["norm=ghost", "nbs=16"], 4, (16, 1)),
        (["norm=ghost", "nbs=8", "micro_batch=16", "world_size=2"], 4, (16, 1)),
        (["norm=sync"], 4, (16, 1)),
        (["norm=sync", "nbs=32"], 4, (8, 2)),
        (["norm=sync", "nbs=32", "world_size=4"], 1, (32, 2)),
        (["norm=virtual", "nbs=40", "micro_batch=16"], 2, (16, 2)),
        (["norm=gn"], 8, (8, 1)),
    ],
)
def test_ranks_that_can_form_the_batches_go_on(run, size, formed):
    run = recorded(*run)
    config = continued(run, run | {"world_size": size, "lr": 7.0, "runs": "elsewhere"})
    before, after = plan_of(run), plan_of(config)
    assert (after.world_size, after.nbs) == (size, before.nbs)
    assert (after.micro_batch, after.accumulation) == formed
    assert (config["lr"], config["runs"]) == (run["lr"], "elsewhere")


@pytest.mark.parametrize(
    ("run", "size", "said"),
    [
        (["norm=bn"], 2, "nbs=64 does not divide the 32 samples per rank"),
        (["norm=ghost", "nbs=16"], 8, "nbs=16 does not divide the 8 samples per rank"),
        (["norm=gn"], 3, "world_size=3 does not divide batch_size=64"),
        (
            ["norm=ghost", "nbs=16", "norm.grouping=interleaved"],
            2,
            "micro_batch=32 and not 64",
        ),
        (["norm=sync", "sync_layers=bn1", "world_size=4"], 2, "micro_batch=32 and not 16"),
        (["norm=renorm", "nbs=8"], 4, "norm=renorm trains with running statistics"),
        (["norm=virtual", "nbs=80"], 2, "virtual_extra=48 and not 16"),
    ],
)
def test_other_batches_are_refused_with_the_reason(run, size, said):
    run = recorded(*run)
    with pytest.raises(ConfigError) as error:
        continued(run, run | {"world_size": size})
    assert said in str(error.value)
    assert f"world_size={size}: the run has world_size={run['world_size']}" in str(error.value)
    assert "\n" not in str(error.value)


def test_what_will_be_frozen_must_not_become_another():
    run = recorded("norm=bn", "nbs=16", "freeze_after=2")
    assert continued(run, run | {"world_size": 4})["world_size"] == 4
    run = recorded("norm=bn", "nbs=16", "freeze_after=2", "freeze_statistics=ema")
    with pytest.raises(ConfigError, match="that it freezes: 1 forwards a step and not 4"):
        continued(run, run | {"world_size": 4})


@pytest.mark.parametrize(
    ("run", "size", "why"),
    [
        (["norm=gn"], 8, ""),
        (["norm=bn", "nbs=16", "norm.update=false"], 4, ""),
        (["norm=bn", "nbs=16"], 4, "1 forwards a step and not 4"),
        (["norm=l1", "nbs=16", "world_size=4", "buffers=mean"], 1, "4 forwards a step and not 1"),
        (["norm=virtual", "nbs=40", "micro_batch=16"], 2, "2 forwards a step and not 4"),
        (["norm=ghost", "nbs=16"], 4, ""),
        (["norm=ghost", "nbs=16", "world_size=2", "buffers=mean"], 1, ""),
        (["norm=ghost", "nbs=16", "world_size=2"], 1, "buffers=average of other ranks"),
        (["norm=ghost", "nbs=16", "norm.population=pooled"], 4, "norm.population=pooled of other"),
        (["norm=ghost", "nbs=8", "micro_batch=32"], 2, "1 forwards a step and not 2"),
        (["norm=sync"], 4, ""),
        (["norm=sync", "nbs=32"], 4, ""),
        (["norm=sync", "nbs=32", "world_size=4"], 8, "buffers=average of 2 groups"),
        (["norm=sync", "nbs=32", "world_size=4", "buffers=mean"], 8, ""),
        (["norm=sync", "nbs=32", "world_size=4", "buffers=mean"], 1, "2 forwards a step and not 1"),
    ],
)
def test_running_statistics_are_the_same_or_it_is_said_why_not(run, size, why):
    run = recorded(*run)
    found = other_statistics(run, continued(run, run | {"world_size": size}))
    assert found.startswith(why)
    assert bool(found) == bool(why)


def test_what_is_not_named_stays_as_it_was():
    run = recorded("norm=sync", "nbs=64", "world_size=2") | {"stall_timeout": 9.0}
    asked = run | {"world_size": 1, "stall_timeout": 600.0, "runs": "elsewhere"}
    assert continued(run, asked, keys(["resume=tiny"])) == run
    config = continued(run, asked, keys(["resume=tiny", "world_size=1"]))
    assert (config["world_size"], config["stall_timeout"]) == (1, 9.0)


def test_a_run_that_is_resumed_stays_what_it_was():
    check_resume(["resume=tiny", "world_size=2", "runs=here"])
    check_resume(["resume=null", "lr=0.2"])
    with pytest.raises(ConfigError, match=r"^lr=0\.2: a run that is resumed stays what it was"):
        check_resume(["world_size=2", "lr=0.2", "resume=tiny"])


# -- in numbers -----------------------------------------------------------------------------------

EPOCHS = ["epochs=2", "buffers=mean"]


def half_way(_rank, overrides, path, steps, resumed):
    """Train some steps and save, or go on from what was saved; the rank's end."""
    ours = whole.trainer(whole.made([*overrides, *EPOCHS]), Path(path))
    if resumed:
        ours.load_state_dict(checkpoint.load(Path(path)))
    places = {"places": ours._places(), "start_step": ours.step}
    for x, y in list(ours.data.train_batches(batch_size=64, seed=3, epoch=0, **places))[:steps]:
        ours._train_step(x, y)
    ours.save() if steps else ours.train_epoch()
    return copy.deepcopy(ours.model.state_dict()), ours.history


@pytest.mark.parametrize(
    ("alone", "together"),
    [
        (["norm=ghost", "nbs=16"], ["norm=ghost", "nbs=16", "world_size=4"]),
        (["norm=sync", "nbs=32"], ["norm=sync", "nbs=32", "world_size=4"]),
        (["norm=sync", "nbs=32"], ["norm=sync", "nbs=32", "world_size=4", "micro_batch=8"]),
        (["norm=bn", "nbs=16"], ["norm=bn", "nbs=16", "world_size=4"]),
    ],
)
@pytest.mark.parametrize("fewer", [True, False])
def test_what_goes_on_is_the_same_run(ranks, tmp_path, alone, together, fewer):
    """In the middle of an epoch, from four ranks to one process and back: its weights and sums; its
    running statistics, as it is said."""
    configs = [whole.resolved(*overrides, *EPOCHS) for overrides in (alone, together)]
    alike = not other_statistics(*configs)
    path = str(tmp_path / "checkpoint.pt")
    expected, history = half_way(0, alone, path, 0, False)
    if fewer:
        ranks.run(half_way, together, path, 2, False)
        found, told = half_way(0, alone, path, 0, True)
    else:
        half_way(0, alone, path, 2, False)
        found, told = ranks.run(half_way, together, path, 0, True)[3]
    for name, value in expected.items():
        moved = "running" in name or "num_batches" in name
        if alike or not moved:
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12)
        else:
            assert not torch.allclose(found[name].double(), value.double(), rtol=1e-6)
    assert told == [pytest.approx(row, rel=1e-12) for row in history]


# -- on the command line --------------------------------------------------------------------------

RUN = ["scale=demo", "device=cpu", "threads=1", "norm=sync", "batch_size=64", "data.subset=200"]


def look(stop, due=False):
    """The second look finds that the run was asked to stop."""
    stop.looks += 1
    stop.settled = signal.SIGTERM if stop.looks == 2 else None
    return due or stop.looks == 2


def stopped(config):
    """The directory of a run whose one process is stopped in the first epoch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.Stop, "look", look)
        with pytest.raises(SystemExit):
            launch.run(config)
    (run,) = runs.listed(Path(config["runs"]))
    return run.path


def test_the_directory_is_kept_and_tells_of_its_ranks(tmp_path, capsys):
    """Two ranks end the run, in its directory."""
    config = compose([*RUN, "epochs=2", "evals=[val:ema]", f"runs={tmp_path}"])
    directory = stopped(config)
    line = [f"resume={directory.name[:12]}", "world_size=2", f"runs={tmp_path}"]
    assert cli.main(["train", *line]) == 0
    assert [path.name for path in tmp_path.glob("tiny-*")] == [directory.name]
    run = RunDir(directory)
    assert run.status()["status"] == "done"
    assert run.config() == config | {"world_size": 2, "nbs": 64, "buffers": "mean"}
    assert run.env()["world_sizes"] == ["1 from epoch 1, step 0", "2 from epoch 1, step 2"]
    rows = (directory / "metrics.csv").read_text().splitlines()
    assert len(rows) == 3
    assert json.loads((directory / "status.json").read_text())["epoch"] == 2
    capsys.readouterr()
    assert cli.main(["train", line[0], "lr=0.2", line[2]]) == 2
    assert cli.main(["train", "resume=nothing", line[2]]) == 2
    said = capsys.readouterr().err
    assert "lr=0.2: a run that is resumed stays what it was" in said
    assert "no run 'nothing'" in said


def test_three_ranks_go_on_with_96_samples_as_one_process_would(tmp_path):
    """Nothing is asked of the defaults, whose batch three ranks cannot share; `val:ema` agrees."""
    config = compose(
        ["scale=demo", "device=cpu", "threads=1", "data=synthetic", "data.n=192", "batch_size=96",
         "norm=ghost", "nbs=16", "epochs=2", "evals=[val:ema,val:precise]"]
    )  # fmt: skip
    directory = stopped(config | {"runs": str(tmp_path / "three")})
    assert cli.main(["train", f"resume={directory}", "world_size=3"]) == 0
    alone = launch.run(config | {"runs": str(tmp_path / "alone")})
    three, one = RunDir(directory), RunDir(alone.path)
    assert (three.env()["world_size"], "other_statistics" in three.env()) == (3, False)
    for ours, theirs in zip(three.evals(), one.evals(), strict=True):
        assert ours["protocol"] == theirs["protocol"]
        assert float(ours["loss"]) == pytest.approx(float(theirs["loss"]), rel=1e-4)


def content(directory):
    return {path: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def test_running_statistics_that_are_read_must_not_become_others(tmp_path, capsys):
    """Of bn, whose every forward moves them: refused where an evaluation reads them, and what has
    gone on without one has none later."""
    words = [*RUN, "norm=bn", "nbs=16", "epochs=2", f"runs={tmp_path}"]
    config = compose([*words, "evals=[val:ema]"])
    directory = stopped(config)
    before = content(directory)
    more = [f"resume={directory}", "launch=false"]
    assert cli.main(["train", *more, "world_size=2"]) == 2
    assert capsys.readouterr().err == (
        "normlab: world_size=2: the run has world_size=1, and the running statistics that val:ema"
        " reads would be others: 2 forwards a step and not 4\n"
    )
    assert content(directory) == before
    RunDir(directory).write_config(config | {"evals": ["val:precise"]})
    assert cli.main(["train", *more, "world_size=2"]) == 0
    assert RunDir(directory).env()["other_statistics"] == "2 forwards a step and not 4"
    with pytest.raises(ValueError, match=r"val:ema: run .* went on with other ranks"):
        launch.run(config)
    assert cli.main(["train", f"resume={directory}", "world_size=1", "launch=true"]) == 0
    capsys.readouterr()
    assert cli.main(["eval", str(directory), "val:ema"]) == 2
    assert "which moved the running statistics otherwise" in capsys.readouterr().err
    assert cli.main(["eval", str(directory), "val:batch"]) == 0
    measured = [row["protocol"] for row in RunDir(directory).evals()]
    assert measured == ["val:precise", "val:batch"]
