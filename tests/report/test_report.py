"""The whole report, from runs to files, compared with files that a person has read.

After a change that is meant, refresh and read the differences:

    REFRESH_GOLDEN=1 pytest tests/report/test_report.py && git diff tests/report
"""

import csv
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from normlab import experiment as experiments
from normlab import report
from normlab.report import gather, grid
from normlab.runs import COLUMNS

HERE = Path(__file__).parent
GOLDEN = ["table-demo.md", "table-demo.csv", "table-desk.md", "table-desk.csv", "table-desk.tex"]


def write_report(results: Path, runs: Path | str = "no/such/runs", **options: bool) -> int:
    return report.main([], runs=str(runs), results=str(results), **{"refresh": False, **options})


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.usefixtures("no_figures")
def test_end_to_end(recorded: Path, capsys: pytest.CaptureFixture[str]):
    assert write_report(recorded) == 0
    shown = capsys.readouterr().out.replace(str(recorded.parent), "")
    made = {name: (recorded / "small" / name).read_text() for name in GOLDEN}
    made |= {"verdicts.csv": (recorded / "verdicts.csv").read_text(), "terminal.txt": shown}
    if os.environ.get("REFRESH_GOLDEN"):
        for name, content in made.items():
            (HERE / "golden" / name).write_text(content)
    for name, content in made.items():
        assert content == (HERE / "golden" / name).read_text(), name


def test_every_file_is_there(recorded: Path):
    write_report(recorded)
    kinds = ["figure-{}.png", "figure-{}.svg", "table-{}.csv", "table-{}.md", "table-{}.tex"]
    expected = {f"small/{kind.format(scale)}" for kind in kinds for scale in ("demo", "desk")}
    expected |= {"index.html", "verdicts.csv", "small/runs.csv"}
    assert set(files(recorded)) == expected


def test_reporting_twice_writes_the_same_bytes(recorded: Path):
    write_report(recorded)
    once = files(recorded)
    write_report(recorded)
    assert files(recorded) == once


@pytest.mark.usefixtures("no_figures")
def test_the_record_keeps_every_row(recorded: Path):
    before = gather.read(recorded / "small" / "runs.csv")
    write_report(recorded)
    after = gather.read(recorded / "small" / "runs.csv")
    assert sorted(map(repr, after)) == sorted(map(repr, before))


@pytest.mark.usefixtures("no_figures")
def test_a_record_of_another_grid_is_kept_and_marked(recorded: Path, make_run, capsys):
    path = recorded / "small" / "runs.csv"
    strange = make_run("desk", 2, 100, {"test_precise": 1.0}, cell="00000000", id="strange")
    path.write_text(gather.csv_text(gather.read(path) + strange, COLUMNS))
    write_report(recorded)
    assert "strange" in path.read_text()
    assert "1 committed runs are no cell of today's grid" in capsys.readouterr().out


@pytest.mark.usefixtures("no_figures", "small")
def test_nothing_run_is_a_report_too(tmp_path: Path, capsys):
    assert write_report(tmp_path / "results") == 0
    assert "scale desk: not run, fill it with: normlab sweep small scale=desk" in (
        capsys.readouterr().out
    )
    assert "Nothing has been run yet" in (tmp_path / "results" / "index.html").read_text()
    assert not (tmp_path / "results" / "small").exists()


@pytest.mark.usefixtures("no_figures")
def test_a_scale_that_cannot_be_composed_is_said_and_the_others_reported(
    recorded: Path, monkeypatch, capsys
):
    compose: Callable[[list[str]], dict[str, object]] = grid.config.compose

    def refuse(overrides: list[str]) -> dict[str, object]:
        if "scale=demo" in overrides:
            raise ValueError("conf/scale/demo.yaml is broken")
        return compose(overrides)

    monkeypatch.setattr(grid.config, "compose", refuse)
    before = gather.read(recorded / "small" / "runs.csv")
    assert write_report(recorded) == 0
    out = capsys.readouterr().out
    assert "scale demo: not reported, its cells cannot be composed: conf/scale/demo.yaml" in out
    assert "no cell of today's grid" not in out
    assert "tiny on cifar10 (JPEG copy, lossy), n = 10 seeds" in out
    assert len(gather.read(recorded / "small" / "runs.csv")) == len(before)


@pytest.mark.usefixtures("small")
def test_an_unknown_experiment_is_refused_before_anything_is_written(tmp_path: Path):
    with pytest.raises(ValueError, match="no experiment 'smal'"):
        report.main(["smal"], runs="runs", results=str(tmp_path / "results"), refresh=False)
    assert not (tmp_path / "results").exists()


def local_run(root: Path, row: gather.Row, rows: list[gather.Row]) -> None:
    """A run directory as a run leaves it."""
    import json

    folder = root / row["id"]
    folder.mkdir(parents=True)
    plain = {k: row[k] for k in ("scale", "experiment", "precision")}
    config = plain | {"seed": int(row["seed"]), "batch_size": 128, "epochs": 3, "lr": 0.1}
    config |= {group: {"name": row[group]} for group in ("model", "norm", "data")}
    env = {k: row[k] for k in ("cell", "device", "torch", "commit", "source", "data_digest")}
    env |= {k: row[k] for k in ("data_note", "claims", "started")}
    env |= {"nbs": int(row["nbs"]), "dirty": False, "threads": 1, "chance": 90.0}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "env.json").write_text(json.dumps(env))
    (folder / "status.json").write_text(json.dumps({"status": row["status"], "seconds": 12.5}))
    with (folder / "evals.csv").open("w", newline="") as file:
        columns = ["protocol", "split", "statistics", "batch", "samples", "order", "epoch", "n"]
        writer = csv.DictWriter(file, [*columns, "error", "loss"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.usefixtures("no_figures", "small")
def test_local_runs_join_and_survive_their_directories(make_run, tmp_path: Path):
    for seed in (100, 101):
        rows = make_run("desk", 2, seed, {"test_precise": 40.0 + seed % 7 / 3})
        local_run(tmp_path / "runs", rows[0], rows)
    write_report(tmp_path / "results", tmp_path / "runs")
    once = files(tmp_path / "results")
    write_report(tmp_path / "results", tmp_path / "runs")
    assert files(tmp_path / "results") == once
    shutil.rmtree(tmp_path / "runs")
    write_report(tmp_path / "results", tmp_path / "runs")
    assert files(tmp_path / "results") == once
    rows = gather.read(tmp_path / "results" / "small" / "runs.csv")
    assert [(row["seed"], row["dirty"]) for row in rows] == [("100", "false"), ("101", "false")]


@pytest.mark.usefixtures("no_figures", "small")
def test_runs_of_other_cells_stay_out_of_the_record(make_run, tmp_path: Path):
    for cell, seed in (("ffffffff", 100), ("", 0)):
        rows = make_run("desk", 2, seed, {"test_precise": 40.0}, id=f"run{seed}")
        rows = [row | ({"cell": cell} if cell else {}) for row in rows]
        local_run(tmp_path / "runs", rows[0], rows)
    write_report(tmp_path / "results", tmp_path / "runs")
    assert not (tmp_path / "results" / "small").exists()


@pytest.mark.usefixtures("no_figures")
def test_running_the_record_again_is_compared_and_refreshed_on_request(
    recorded: Path, make_run, tmp_path: Path, capsys
):
    errors = {"test_precise": 99.0, "test_batch": 42.0, "train_batch": 14.0}
    rows = make_run("desk", 8, 100, errors, started="later")
    local_run(tmp_path / "runs", rows[0], rows)
    before = (recorded / "small" / "runs.csv").read_bytes()
    write_report(recorded)
    kept = (recorded / "small" / "runs.csv").read_bytes()
    write_report(recorded, tmp_path / "runs")
    assert (recorded / "small" / "runs.csv").read_bytes() == kept
    said = "1 committed run was run again here: largest difference"
    assert said in capsys.readouterr().out
    assert said in (recorded / "index.html").read_text()
    write_report(recorded, tmp_path / "runs", refresh=True)
    assert b"99.0" in (recorded / "small" / "runs.csv").read_bytes()
    assert b"99.0" not in before


@pytest.mark.usefixtures("no_figures")
def test_all_experiments_of_a_scale_share_the_correction(recorded: Path, make_run, monkeypatch):
    def p_holm(*names: str) -> str:
        report.main(names, runs="none", results=str(recorded), refresh=False)
        with (recorded / "verdicts.csv").open() as file:
            lines = [row for row in csv.DictReader(file) if row["claim"] == "bottom_is_flat"]
        return next(row["p_holm"] for row in lines if row["scale"] == "desk")

    alone = p_holm()
    small = HERE / "fixture" / "small.yaml"
    monkeypatch.setattr(experiments, "files", lambda: {"small": small, "twin": small})
    assert p_holm("small") == alone  # nobody has run the other one
    (recorded / "twin").mkdir()
    rows = make_run("desk", 2, 100, {"test_batch": 41.0, "test_precise": 40.0})
    (recorded / "twin" / "runs.csv").write_text(gather.csv_text(rows, COLUMNS))
    assert float(p_holm("small")) > float(alone)


@pytest.mark.usefixtures("no_figures")
def test_what_another_experiment_recorded_is_reported_and_not_asked_for(
    make_run, tmp_path: Path, monkeypatch, capsys
):
    """A sweep skips what any record holds: a report that asked for it would ask for ever."""
    small = HERE / "fixture" / "small.yaml"
    monkeypatch.setattr(experiments, "files", lambda: {"small": small, "twin": small})
    results = tmp_path / "results"
    (results / "small").mkdir(parents=True)
    rows = make_run("desk", 2, 100, {"train_batch": 30.0, "test_batch": 41.0, "test_precise": 40.0})
    rows += make_run("desk", 2, 0, {"test_precise": 10.0})  # no seed of the twin's
    (results / "small" / "runs.csv").write_text(gather.csv_text(rows, COLUMNS))
    options = {"runs": "none", "results": str(results), "refresh": False}
    report.main(["small"], **options)
    assert not (results / "twin").exists()
    report.main(["twin"], **options)
    assert "NBS 2: seeds 101-109: normlab sweep twin" in capsys.readouterr().out
    taken = gather.read(results / "twin" / "runs.csv")
    assert sorted(map(repr, taken)) == sorted(map(repr, rows[:3]))
    before = files(results)
    report.main([], **options)
    assert files(results) == before
    # A record whose experiment is gone counts as well.
    shutil.rmtree(results / "twin")
    (results / "small").rename(results / "gone")
    report.main(["twin"], **options)
    assert gather.read(results / "twin" / "runs.csv") == taken
    assert "seeds 101-109" in capsys.readouterr().out


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("shared_before", [True, False])
def test_an_execution_with_all_that_is_asked_goes_before_a_record_with_less(
    make_run, tmp_path: Path, monkeypatch, whole, shared_before
):
    """The same run, executed twice with other numbers: the record of "small" lacks an evaluation
    that "twin" asks for, and its evaluations are never mixed with those of the local run."""
    small = HERE / "fixture" / "small.yaml"
    monkeypatch.setattr(experiments, "files", lambda: {"small": small, "twin": small})
    results = tmp_path / "results"
    (results / "small").mkdir(parents=True)
    recorded = make_run("desk", 2, 100, {"train_batch": 30.0, "test_batch": 41.0})
    (results / "small" / "runs.csv").write_text(gather.csv_text(recorded, COLUMNS))
    if shared_before:
        report.main(["twin"], runs="none", results=str(results), refresh=False)
        assert gather.read(results / "twin" / "runs.csv")
    errors = {"train_batch": 31.0, "test_batch": 42.0, "test_precise": 40.0}
    if not whole:
        del errors["test_batch"]
    rows = make_run("desk", 2, 100, errors, started="later")
    local_run(tmp_path / "runs", rows[0], rows)
    report.main(["twin"], runs=str(tmp_path / "runs"), results=str(results), refresh=False)
    taken = gather.read(results / "twin" / "runs.csv")
    expected = errors if whole else {"train_batch": 30.0, "test_batch": 41.0}
    assert sorted(float(row["error"]) for row in taken) == sorted(expected.values())
    kept = gather.read(results / "small" / "runs.csv")
    assert sorted(map(repr, kept)) == sorted(map(repr, recorded))


@pytest.mark.usefixtures("no_figures")
def test_shared_runs_enter_only_the_reports_that_were_asked_for(
    make_run, tmp_path: Path, monkeypatch
):
    small = HERE / "fixture" / "small.yaml"
    monkeypatch.setattr(experiments, "files", lambda: {"small": small, "twin": small})
    results = tmp_path / "results"
    rows = make_run("desk", 2, 100, {"test_precise": 40.0})
    local_run(tmp_path / "runs", rows[0], rows)
    named = {"runs": str(tmp_path / "runs"), "results": str(results), "refresh": False}
    report.main(["twin"], **named)
    assert [path.name for path in results.iterdir() if path.is_dir()] == ["twin"]
    sections = re.findall(r'<h2 id="(\w+)"', (results / "index.html").read_text())
    assert sections[:2] == ["twin", "small"]  # what was run comes first
    # What another experiment has committed stays in the report, written anew.
    report.main(["small"], **named)
    assert (results / "twin" / "table-desk.md").is_file()
    (results / "twin" / "table-desk.md").unlink()
    report.main(["small"], **named)
    assert (results / "twin" / "table-desk.md").is_file()


@pytest.mark.usefixtures("no_figures")
def test_one_broken_run_hides_no_other(make_run, tmp_path: Path, caplog):
    for seed in (100, 101):
        rows = make_run("desk", 2, seed, {"test_precise": 40.0})
        local_run(tmp_path / "runs", rows[0], rows)
    broken = tmp_path / "runs" / rows[0]["id"] / "evals.csv"
    broken.write_text(broken.read_text().replace("40.0", "forty"))
    assert write_report(tmp_path / "results", tmp_path / "runs") == 0
    assert str(broken.parent) in caplog.text
    rows = gather.read(tmp_path / "results" / "small" / "runs.csv")
    assert [row["seed"] for row in rows] == ["100"]


@pytest.mark.usefixtures("no_figures")
def test_only_the_named_experiments_are_printed(recorded: Path, capsys):
    report.main(["small"], runs="none", results=str(recorded), refresh=False)
    assert capsys.readouterr().out.startswith("small: A small <experiment> & its table")


@pytest.mark.usefixtures("no_figures")
def test_the_real_experiment_recognises_its_own_runs(tmp_path: Path):
    """Not through the stand-in: the cell of a run is the real one."""
    loaded = experiments.load("nbs")
    key = next(iter(grid.compose(loaded, "demo").points))
    folder = tmp_path / "results" / "nbs"
    folder.mkdir(parents=True)
    run = dict.fromkeys(COLUMNS, "") | {
        "id": "tiny", "cell": key, "scale": "demo", "seed": "100", "status": "done",
        "torch": "2.11", "protocol": "test:precise", "epoch": "15", "error": "40.0",
        "claims": f"nbs:{loaded.claims_digest('demo')}",
    }  # fmt: skip
    (folder / "runs.csv").write_text(gather.csv_text([run], COLUMNS))
    report.main(["nbs"], runs="none", results=str(tmp_path / "results"), refresh=False)
    assert "| 2   | 0-1 |" in (folder / "table-demo.md").read_text()
