"""Run directories as files, and the table made of them."""

import csv
import json
import os
from pathlib import Path

import pytest
import yaml

from normlab import runs
from normlab.runs import RunDir

CONFIG = {
    "model": {"name": "tiny"},
    "norm": {"name": "ghost", "batch": "ghost"},
    "data": {"name": "digits"},
    "nbs": 8,
    "batch_size": 64,
    "epochs": 2,
    "lr": 0.1,
    "decay": 0.9,
    "seed": 100,
    "scale": "demo",
}
ROW = {
    "protocol": "val:ema", "split": "val", "statistics": "ema", "batch": "", "samples": "",
    "order": "", "epoch": 2, "n": 300, "error": 12.5, "loss": 0.5,
}  # fmt: skip


def finished(root: Path, name: str = "tiny-ghost-nbs8-s100-0123abcd", **env) -> RunDir:
    run = RunDir(root / name)
    with run.lock():
        run.write_config(CONFIG)
        run.write_env({"nbs": 8, "cell": "c0ffee00", "torch": "2.11.0", "device": "cpu", **env})
        run.add_eval(ROW)
        run.write_status({"status": "done", "seconds": 1.5})
    return run


def test_the_table_has_a_row_per_evaluation(tmp_path):
    run = finished(tmp_path)
    run.add_eval({**ROW, "protocol": "val:batch", "statistics": "batch", "batch": 8})
    table = runs.table(tmp_path)
    assert list(table.columns) == runs.COLUMNS
    assert list(table["protocol"]) == ["val:ema", "val:batch"]
    assert set(table["nbs"]) == {8}
    assert set(table["norm"]) == {"ghost"}
    assert set(table["status"]) == {"done"}
    assert table["error"].tolist() == [12.5, 12.5]


def test_an_unfinished_run_is_a_row_without_an_evaluation(tmp_path):
    run = RunDir(tmp_path / "tiny-bn-s0-00000000")
    with run.lock():
        run.write_config(CONFIG)
    (row,) = runs.table(tmp_path).to_dict("records")
    assert row["status"] == "unfinished"
    assert row["protocol"] != row["protocol"]


def test_an_empty_or_absent_root_is_an_empty_table(tmp_path):
    assert len(runs.table(tmp_path / "nowhere")) == 0
    assert list(runs.table(tmp_path).columns) == runs.COLUMNS


def test_an_unreadable_run_is_left_out_with_a_warning(tmp_path, caplog):
    finished(tmp_path)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.yaml").write_text("{")
    assert len(runs.table(tmp_path)) == 1
    assert "broken" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config.yaml", "{}", "no 'model'"),
        ("config.yaml", "[", "cannot be read"),
        ("config.yaml", "model: tiny", "left out"),
        ("evals.csv", "protocol,epoch,error\ntest:ema,2,twelve\n", "error is 'twelve'"),
        ("evals.csv", "protocol,epoch,error\ntest:ema,last,12\n", "epoch is 'last'"),
        ("evals.csv", b"protocol,epoch,error\n\xff\xfe,2,12\n", "decode"),
        ("env.json", "[1]", "left out"),
        ("status.json", '{"status": "done", "seconds": "long"}', "seconds is 'long'"),
    ],
)
def test_one_broken_run_is_named_and_hides_no_other(tmp_path, caplog, name, content, says):
    finished(tmp_path)
    broken = finished(tmp_path, "broken")
    content = content if isinstance(content, bytes) else content.encode()
    (broken.path / name).write_bytes(content)
    assert set(runs.table(tmp_path)["id"]) == {"tiny-ghost-nbs8-s100-0123abcd"}
    assert str(broken.path) in caplog.text
    assert says in caplog.text


def test_an_evaluation_made_again_replaces_its_row(tmp_path):
    run = finished(tmp_path)
    run.add_eval({**ROW, "error": 11.0})
    assert [row["error"] for row in run.evals()] == ["11.0"]
    run.add_eval({**ROW, "epoch": 1})
    assert len(run.evals()) == 2


def test_a_run_is_found_by_id_prefix_and_path(tmp_path):
    run = finished(tmp_path)
    for name in (run.id, run.id[:12], str(run.path)):
        assert runs.find(name, tmp_path).path.resolve() == run.path.resolve()
    finished(tmp_path, "tiny-ghost-nbs8-s101-0123abcd")
    with pytest.raises(ValueError, match="ambiguous"):
        runs.find("tiny-ghost", tmp_path)
    with pytest.raises(ValueError, match=r"no run 'resnet' .*tiny-ghost"):
        runs.find("resnet", tmp_path)
    with pytest.raises(ValueError, match="there are none"):
        runs.find("resnet", tmp_path / "empty")


def test_committed_results_are_read(tmp_path):
    (tmp_path / "nbs").mkdir()
    rows = [
        {"id": "a", "status": "done", "protocol": "val:ema", "epoch": "2", "error": "7.5"},
        {"id": "a", "status": "done", "protocol": "val:batch", "epoch": "2.0", "error": "8"},
        {"id": "b", "status": "failed", "protocol": "", "epoch": "", "error": ""},
        {"id": "c", "status": "diverged", "protocol": "", "epoch": "", "error": ""},
    ]
    path = tmp_path / "nbs" / "runs.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert runs.committed(tmp_path) == {
        "a": runs.Committed("done", {("val:ema", 2): 7.5, ("val:batch", 2): 8.0}, {}, path),
        "c": runs.Committed("diverged", {}, {}, path),
    }


@pytest.mark.parametrize("content", [b"id,status\n\xff\xfe,done\n", b"nothing\nof the kind\n"])
def test_committed_results_that_are_no_table_are_named(tmp_path, content):
    (tmp_path / "nbs").mkdir()
    (tmp_path / "nbs" / "runs.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"nbs.runs\.csv is not a table of runs") as error:
        runs.committed(tmp_path)
    assert "\n" not in str(error.value)


def test_files_are_plain(tmp_path):
    run = finished(tmp_path)
    assert yaml.safe_load((run.path / "config.yaml").read_text()) == CONFIG
    assert json.loads((run.path / "status.json").read_text())["status"] == "done"
    assert not [path for path in run.path.iterdir() if path.name.endswith(str(os.getpid()))]


def test_the_source_digest_ignores_what_no_run_executes(tmp_path, monkeypatch):
    package = tmp_path / "normlab"
    (package / "norms").mkdir(parents=True)
    (package / "report").mkdir()
    for name in ("runs.py", "train.py", "norms/bn.py", "report/page.py"):
        (package / name).write_text("x = 1\n")
    monkeypatch.setattr(runs, "__file__", str(package / "runs.py"))
    digest = runs.source_digest.__wrapped__
    before = digest()
    (package / "report" / "page.py").write_text("x = 2\n")
    assert digest() == before
    (package / "norms" / "bn.py").write_text("x = 2\n")
    assert digest() != before
