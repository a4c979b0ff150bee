"""Merging: the record is never lost, never silently replaced, and read back as it was written."""

import math

import numpy as np
import pandas as pd
import pytest

from normlab.report.gather import csv_text, merge, read, rows_of, text, unite
from normlab.runs import COLUMNS


def test_what_is_written_is_read_back(make_runs, tmp_path):
    path = tmp_path / "runs.csv"
    rows = make_runs("desk")
    path.write_text(csv_text(rows, COLUMNS))
    assert read(path) == rows


@pytest.mark.parametrize(
    ("column", "value", "expected"),
    [
        ("seed", np.float64(100.0), "100"),
        ("nbs", 2, "2"),
        ("nbs", math.nan, ""),
        ("nbs", None, ""),
        ("error", np.float64(1 / 3), "0.3333333333333333"),
        ("error", 41.0, "41.0"),
        ("error", math.inf, "inf"),
        ("dirty", True, "true"),
        ("dirty", np.bool_(False), "false"),
        ("lr", 0.1, "0.1"),
        ("commit", pd.NA, ""),
        ("id", "a,b", "a,b"),
    ],
)
def test_numbers_have_one_spelling(column, value, expected):
    assert text(column, value) == expected


def test_a_frame_becomes_rows_with_all_columns():
    frame = pd.DataFrame({"id": ["a"], "seed": [100], "error": [12.5], "dirty": [False]})
    (row,) = rows_of(frame)
    assert list(row) == COLUMNS
    assert (row["seed"], row["error"], row["dirty"], row["loss"]) == ("100", "12.5", "false", "")


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"runs\.csv is not a table of runs"):
        read(path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"error": "twelve"}, "line 2: error is 'twelve'"),
        ({"batch": "2.5"}, "line 2: batch is '2.5'"),
        ({"epoch": "last"}, "line 2: epoch is 'last'"),
        ({"chance": "90 %"}, "line 2: chance is '90 %'"),
        ({"commit": "\udcff"}, "codec can't decode"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(make_run, tmp_path, change, says):
    path = tmp_path / "runs.csv"
    (row,) = make_run("desk", 2, 100, {"test_precise": 40.0}, **change)
    path.write_text(csv_text([row], COLUMNS), errors="surrogateescape")
    with pytest.raises(ValueError, match=says) as refused:
        read(path)
    assert str(refused.value).startswith(str(path))


def test_no_file_is_no_rows(tmp_path):
    assert read(tmp_path / "runs.csv") == []


def test_committed_rows_are_kept_and_local_ones_added(make_run):
    old = make_run("desk", 2, 100, {"test_precise": 40.0})
    new = make_run("desk", 2, 101, {"test_precise": 41.0})
    rows, again = merge(old, new)
    assert rows == old + new
    assert again is None


def test_the_same_run_is_not_compared_with_itself(make_run):
    old = make_run("desk", 2, 100, {"test_precise": 40.0})
    assert merge(old, old) == (old, None)


def test_another_execution_is_compared_and_does_not_replace(make_run):
    old = make_run("desk", 2, 100, {"test_precise": 40.0, "test_batch": 42.0})
    new = make_run("desk", 2, 100, {"test_precise": 40.25, "test_batch": 42.0}, started="later")
    rows, again = merge(old, new)
    assert rows == old
    assert str(again) == (
        "1 committed run was run again here: largest difference 0.25 points; "
        "the record stands (--refresh takes the new numbers)"
    )


def test_identical_executions_say_so(make_run):
    old = make_run("desk", 2, 100, {"test_precise": 40.0}) + make_run(
        "desk", 2, 101, {"test_precise": 41.0}
    )
    rows, again = merge(old, [row | {"started": "later"} for row in old])
    assert rows == old
    assert str(again) == "2 committed runs were run again here: identical"


def test_refresh_replaces_and_says_so(make_run):
    old = make_run("desk", 2, 100, {"test_precise": 40.0})
    new = make_run("desk", 2, 100, {"test_precise": 40.5}, started="later")
    rows, again = merge(old, new, refresh=True)
    assert rows == new
    assert str(again).endswith("largest difference 0.5 points; the new numbers replaced them")


def test_refresh_loses_no_evaluation(make_run):
    errors = {"test_precise": [50.0, 40.0], "test_batch": [51.0, 42.0]}
    old = make_run("desk", 2, 100, errors) + make_run("desk", 2, 101, errors)
    poorer = make_run("desk", 2, 100, {"test_precise": 40.5}, started="later")
    whole = make_run("desk", 2, 101, errors | {"test_precise": [50.0, 40.5]}, started="later")
    rows, again = merge(old, poorer + whole, refresh=True)
    assert rows == old[:4] + whole
    assert str(again) == (
        "2 committed runs were run again here: largest difference 0.5 points; the new numbers "
        "replaced 1, the record stands for 1 that lack evaluations it has: "
        f"{old[0]['id']} without test:batch of epochs 2, 3 and test:precise of epoch 2"
    )
    # Where a run diverged there is nothing left to evaluate.
    diverged = make_run("desk", 2, 100, {}, started="later", status="diverged")
    assert merge(old[:4], diverged, refresh=True)[0] == diverged


def test_records_of_one_run_are_united(make_run):
    own = make_run("desk", 2, 100, {"test_precise": 40.0}, source="own")
    other = make_run("desk", 2, 100, {"test_precise": 40.0, "test_batch": 42.0}, source="other")
    third = make_run("desk", 2, 100, {"train_batch": 30.0}, started="later")
    rows = unite(own, [other, third])
    assert [row["error"] for row in rows] == ["40.0", "42.0", "30.0"]
    assert {row["source"] for row in rows} == {"own"}
    assert unite(rows, [other, third]) == rows
    contradicting = make_run("desk", 2, 100, {"test_precise": 41.0, "test_batch": 42.0})
    assert unite(own, [contradicting]) == own
    failed = make_run("desk", 2, 100, {}, status="failed")
    assert unite(failed, [own]) == unite(own, [failed]) == unite([], [own]) == own


def test_another_torch_is_another_run(make_run):
    old = make_run("desk", 2, 100, {"test_precise": 40.0})
    new = make_run("desk", 2, 100, {"test_precise": 40.5}, torch="2.15.0", started="later")
    assert merge(old, new) == (old + new, None)


def test_a_further_evaluation_joins_the_record(make_run):
    old = make_run("desk", 2, 100, {"test_precise": 40.0})
    new = make_run("desk", 2, 100, {"test_precise": 40.0, "test_batch": 42.0})
    rows, _ = merge(old, new)
    assert rows == new


def test_an_evaluation_of_an_execution_that_differs_stays_out(make_run):
    old = make_run("desk", 2, 100, {"test_precise": 40.0})
    new = make_run("desk", 2, 100, {"test_precise": 40.1, "test_batch": 42.0}, started="later")
    assert merge(old, new)[0] == old


def test_an_evaluation_joins_a_run_recorded_without_any(make_run):
    old = make_run("desk", 2, 100, {})
    new = make_run("desk", 2, 100, {"test_precise": 40.0})
    assert merge(old, new)[0] == new


@pytest.mark.parametrize("status", ["unfinished", ""])
def test_unfinished_local_runs_are_left_out(make_run, status):
    new = make_run("desk", 2, 100, {"test_precise": 40.0}, status=status)
    assert merge([], new) == ([], None)


def test_a_local_success_fills_a_committed_failure(make_run):
    old = make_run("desk", 2, 100, {}, status="failed")
    new = make_run("desk", 2, 100, {"test_precise": 40.0}, started="later")
    assert merge(old, new)[0] == new


def test_a_local_failure_never_takes_the_place_of_a_number(make_run):
    old = make_run("desk", 2, 100, {"test_precise": 40.0})
    new = make_run("desk", 2, 100, {}, status="failed", started="later")
    assert merge(old, new, refresh=True)[0] == old
