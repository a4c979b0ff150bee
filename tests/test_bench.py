"""Benchmarks measure what they say; how fast anything is, no test says."""

import csv
import os
import platform
from pathlib import Path

import pytest

from normlab import allocator
from normlab.bench import loading, main, precise, precise_rows, starting, training, write
from normlab.bench.images import dataset
from normlab.bench.measure import Process, Row, Spread, limit_row, rate_row, take_turns


def test_spread_is_the_median_and_the_quartiles() -> None:
    assert Spread.of([5.0, 1.0, 2.0, 3.0, 4.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_a_ratio_above_one_is_faster_and_taken_within_a_round() -> None:
    row = rate_row("a", "b", [1.0, 10.0], [2.0, 20.0], unit="img/s", amount=100, bar=2.0)
    assert row.ratio == Spread(2.0, 2.0, 2.0)  # though the rounds differ tenfold
    assert row.ours.median == 55.0
    assert row.met
    slower = rate_row("a", "b", [2.0], [1.0], unit="img/s", amount=100, bar=0.97)
    assert not slower.met


def test_a_limit_is_met_below_it() -> None:
    assert limit_row("a", [0.1, 0.12], limit=0.15, clock="").met
    assert not limit_row("a", [0.2, 0.3], limit=0.15, clock="").met


def test_turns_alternate_in_order_and_the_first_round_does_not_count() -> None:
    order: list[str] = []
    seconds = take_turns({name: lambda name=name: order.append(name) for name in "ab"}, 2)
    assert order == ["b", "a", "a", "b", "b", "a"]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def test_a_process_runs_when_told_and_a_dead_one_is_noticed() -> None:
    code = "from normlab.bench.measure import serve; serve(lambda: sum(range(200_000)))"
    with Process(code) as process:
        assert process() > 0
        assert process() > 0
    with Process("raise SystemExit(0)") as process, pytest.raises(RuntimeError, match="early"):
        process()


def test_topics_that_start_quickly_yield_their_rows() -> None:
    rows = [starting.help_row(rounds=1), loading.row(rounds=1, batches=1)]
    assert all(row.ours.median > 0 and row.ratio.median > 0 for row in rows)
    assert [row.bar for row in rows] == [1.0, 4.0]


@pytest.mark.slow  # five processes that import torch
def test_topics_that_train_yield_their_rows() -> None:
    rows = [starting.second_run_row(rounds=1), *training.rows(rounds=1, steps=1)]
    assert all(row.ours.median > 0 and row.ratio.median > 0 for row in rows)
    assert [row.bar for row in rows] == [1.0, 0.97, 1.35]


@pytest.mark.parametrize("channels_last", [False, True])
def test_precise_statistics_are_compared_with_fvcores(channels_last: bool) -> None:
    assert precise.row(rounds=1, images=200, channels_last=channels_last).ratio.median > 0


def test_precise_statistics_are_measured_in_both_layouts_with_memory_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[object] = []
    monkeypatch.setattr(allocator, "keep_freed_memory", lambda: done.append("kept"))
    monkeypatch.setattr(precise, "row", lambda **given: done.append(given) or ROW)
    assert precise_rows(rounds=1, images=5) == [ROW, ROW]
    each = {"rounds": 1, "images": 5}
    assert done == ["kept", each | {"channels_last": False}, each | {"channels_last": True}]


def test_both_sides_of_the_data_path_deliver_the_same_amount() -> None:
    assert dataset(256).size("train") == len(loading.PerSample(256))
    x, y = loading.PerSample(3)[0]
    assert tuple(x.shape) == dataset(3).shape
    assert 0 <= y < 10


ROW = Row("a", "b", "img/s", "CPU", Spread(4, 3, 5), Spread(2, 1, 3), Spread(2, 1, 3), 1.5, 9)


def test_the_files_say_on_what_they_were_measured_but_not_whose_it_is(tmp_path: Path) -> None:
    table, figure = write.results([ROW, ROW], tmp_path / "bench")
    first, _ = csv.DictReader(table.open())
    assert (first["ratio_median"], first["ratio_low"], first["met"]) == ("2", "1", "True")
    assert first["cores"] == str(os.cpu_count())
    assert platform.node() not in table.read_text()
    before = figure.read_bytes()
    write.results([ROW, ROW], tmp_path / "bench")
    assert figure.read_bytes() == before


def test_a_row_without_its_peer_is_left_out_and_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def absent(**_: int) -> Row:
        raise ImportError("No module named 'fvcore'")

    for module, name in ((starting, "help_row"), (starting, "second_run_row"), (loading, "row")):
        monkeypatch.setattr(module, name, lambda **_: ROW)
    monkeypatch.setattr(training, "rows", lambda **_: [ROW])
    monkeypatch.setattr(precise, "row", absent)
    assert main(["--quick"]) == 0
    said = capsys.readouterr().out
    assert "left out: No module named 'fvcore'" in said
    assert said.count("target 1.50x met") == 4
    assert Path("results/bench/bench.csv").is_file()
