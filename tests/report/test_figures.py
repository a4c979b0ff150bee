"""Figures hold the data that was asked for, and their files the same bytes each time."""

import pytest

from normlab import experiment as experiments
from normlab.experiment import Published
from normlab.report import figures, grid, tables
from normlab.report.page import inline_svg


@pytest.fixture
def results(make_runs, results_of):
    return results_of(make_runs("desk"))


def ours(axes) -> dict[str, list[tuple[float, float]]]:
    return {
        bar.get_label().removeprefix("ours "): list(zip(*bar[0].get_data(), strict=True))
        for bar in axes.containers
    }


def bars(axes, protocol: str) -> list[tuple[float, float]]:
    """(low, high) of the intervals drawn."""
    (bar,) = [bar for bar in axes.containers if bar.get_label() == f"ours {protocol}"]
    return [(segment[0][1], segment[1][1]) for segment in bar[2][0].get_segments()]


def test_the_left_panel_has_our_errors(results):
    left = figures.draw(results, "").axes[0]
    found = ours(left)
    assert set(found) == {"test_precise", "test_batch", "train_batch"}
    for protocol, points in found.items():
        expected = [results.sample((("nbs", n),), protocol) for n in (2, 8, 32, 128)]
        assert points == [(n, s.mean) for n, s in zip((2, 8, 32, 128), expected, strict=True)]
        for drawn, sample in zip(bars(left, protocol), expected, strict=True):
            assert drawn == pytest.approx(sample.interval())


def test_the_right_panel_has_changes_ours_and_the_papers(results):
    right = figures.draw(results, "").axes[1]
    change = results.change((("nbs", 2),), "test_precise")
    assert ours(right)["test_precise"][0] == (2, change.mean)
    assert ours(right)["test_precise"][2] == (32, 0)
    assert bars(right, "test_precise")[0] == pytest.approx(change.interval())
    papers = {line.get_label(): line for line in right.get_lines() if "paper" in line.get_label()}
    assert set(papers) == {"paper test_precise", "paper train_batch"}
    line = papers["paper test_precise"]
    assert list(line.get_xdata()) == [2, 8, 32, 128, 1024]
    assert list(line.get_ydata()) == pytest.approx([9.1, 0.9, 0, 0, 0.3])


def test_ours_stand_in_front_in_the_papers_colour(results):
    right = figures.draw(results, "").axes[1]
    for bar in right.containers:
        label = bar.get_label().replace("ours", "paper")
        for line in right.get_lines():
            if line.get_label() == label:
                assert bar[0].get_zorder() > line.get_zorder()
                assert bar[0].get_color() == line.get_color()


def test_the_axis_is_log2_with_every_power(results):
    left, right = figures.draw(results, "").axes
    assert left.get_xscale() == "log"
    assert [tick.get_text() for tick in left.get_xticklabels()] == [
        "2",
        "4",
        "8",
        "16",
        "32",
        "64",
        "128",
    ]
    assert [tick.get_text() for tick in right.get_xticklabels()][-1] == "1024"


def test_the_title_says_what_is_shown(results):
    figure = figures.draw(results, "scale desk, n = 10 seeds")
    assert figure.get_suptitle() == "A small <experiment> & its table: scale desk, n = 10 seeds"


def test_one_seed_is_a_point_without_an_interval(make_run, results_of):
    results = results_of(make_run("desk", 2, 100, {"test_precise": 40.0}))
    left = figures.draw(results, "").axes[0]
    assert ours(left)["test_precise"] == [(2, 40.0)]
    assert bars(left, "test_precise") == [(40.0, 40.0)]


def test_an_unknown_kind_is_refused(small, results):
    small.figure["kind"] = "pie"
    with pytest.raises(ValueError, match=r"no figure kind 'pie' \(kinds: .*curves"):
        figures.draw(results, "")


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_files_are_the_same_bytes_every_time(results, kind):
    once = figures.render(figures.draw(results, "x"), kind)
    assert figures.render(figures.draw(results, "x"), kind) == once
    assert b"202" not in once[:2000] or kind == "png"  # no date in the metadata


def test_an_inlined_figure_keeps_its_identifiers_to_itself():
    svg = (
        '<?xml version="1.0"?><!DOCTYPE svg>\n<svg width="1"><metadata>x</metadata>'
        '<defs><path id="m1"/></defs><use xlink:href="#m1" clip-path="url(#p)"/></svg>'
    )
    inlined = inline_svg(svg, "nbs-desk-", 'a "title"')
    assert inlined.startswith('<svg role="img" aria-label="a &quot;title&quot;" width="1">')
    assert 'id="nbs-desk-m1"' in inlined
    assert 'href="#nbs-desk-m1"' in inlined
    assert "url(#nbs-desk-p)" in inlined
    assert "metadata" not in inlined


ARMS = """
title: Arms
source: a test
set: {}
arms:
  bn-2: {at: {norm: BN, images: 2}, set: {nbs: 2}}
  bn-4: {at: {norm: BN, images: 4}, set: {nbs: 4}}
  gn: {at: {norm: GN}, set: {norm: gn}}
scales: {demo: {axes: {arm: [bn-2, bn-4, gn], seed: [100, 101, 102]}}}
protocols:
  test: {eval: "test:ema", label: test error}
  train: {eval: "train:augmented", label: train error}
baseline: {images: 4}
table: {columns: [test]}
figure: {kind: curves, x: images, xlabel: images, log2: true, by: [norm], series: [test]}
published:
  - {label: A paper, at: {norm: BN}, x: images, values: {test: {2: 30.0, 4: 20.0}}}
  - {label: A paper, at: {norm: GN}, x: images, values: {test: {2: 24.0, 4: 24.0}}}
claims: {}
"""


@pytest.fixture
def arms(tmp_path, monkeypatch, make_run):
    """Results of three arms over two epochs: BN 41 and 31 %, GN 25 %, plus what a seed adds."""
    (tmp_path / "arms.yaml").write_text(ARMS)
    monkeypatch.setattr(experiments, "files", lambda: {"arms": tmp_path / "arms.yaml"})
    experiments.load.cache_clear()
    loaded = experiments.load("arms")
    found = grid.compose(loaded, "demo")
    rows = []
    for key, point in found.points.items():
        error = {2: 41.0, 4: 31.0}.get(dict(point).get("images"), 25.0)
        for seed in (100, 101, 102):
            (run,) = make_run("demo", 2, seed, {})
            for spec, above in (("test:ema", 0.0), ("train:augmented", -10.0)):
                for epoch, late in ((1, 5.0), (2, 0.0)):
                    told = {"protocol": spec, "epoch": str(epoch)}
                    told |= {"error": str(error + above + late + seed - 101), "cell": key}
                    rows.append(run | told | {"id": f"{key}-{seed}"})
    return grid.results(loaded, "demo", found, rows)


def test_lines_are_told_apart_by_what_the_file_says(arms):
    left, right = figures.draw(arms, "").axes
    assert ours(left) == {"test BN": [(2, 41), (4, 31)]}
    assert ours(right) == {"test BN": [(2, 10), (4, 0)]}
    lines = {line.get_label(): line for line in left.get_lines() + right.get_lines()}
    assert list(lines["ours test GN"].get_ydata()) == [25, 25]  # level: it has no place on the axis
    assert list(lines["paper test BN"].get_ydata()) == [10, 0]
    assert list(lines["paper test GN"].get_ydata()) == [0, 0]
    assert lines["paper test GN"].get_color() == lines["ours test GN"].get_color()
    said = [text.get_text() for text in figures.draw(arms, "").legends[0].get_texts()]
    assert said == ["BN", "GN", "ours: mean and 95 % interval over seeds", "A paper"]


def test_the_table_says_where_an_arm_stands_and_what_the_paper_said_there(arms):
    errors, changes = tables.texts(arms)
    assert errors.header == ["norm", "images", "n", "test error", "paper"]
    assert [row[:3] for row in errors.rows] == [["BN", "2", "3"], ["BN", "4", "3"], ["GN", "", "3"]]
    assert [row[-1] for row in errors.rows] == ["30", "20", "–"]
    assert [row[-1] for row in changes.rows] == ["+10.0", "0", "–"]
    # A point that has none of the baseline's axes has no baseline, here and in the CSV.
    assert [row[-2] for row in changes.rows] == ["+10.00 ± 0.00", "0", "–"]
    assert arms.change((("norm", "GN"),), "test").n == 0


def test_the_baseline_is_nothing_where_nobody_said_anything(arms):
    """The paper's 0 needs a published number, ours a run."""
    arms.experiment.published[:] = arms.experiment.published[1:]
    arms.values.clear()
    _, changes = tables.texts(arms)
    assert [row[-2:] for row in changes.rows] == [["–", "–"]] * 3


def test_a_source_that_stands_in_parts_is_named_once(arms):
    assert len(arms.experiment.published) == 2
    assert [said for said in tables.sources(arms.experiment) if "A paper" in said] == [
        "A paper: test error"
    ]


def test_a_source_over_the_lines_has_its_place_on_the_axis(arms):
    source = Published("B", "norm", {"test": {"BN": 30.0, "GN": 28.0}}, {"images": 2})
    arms.experiment.published[:] = [source]
    arms.experiment.baseline.clear()
    arms.experiment.baseline["norm"] = "BN"
    right = figures.draw(arms, "").axes[1]
    lines = {line.get_label(): line.get_xydata().tolist() for line in right.get_lines()}
    assert lines["paper test BN"] == [[2, 0]]
    assert lines["paper test GN"] == [[2, -2]]


def test_errors_over_the_epochs(arms):
    arms.experiment.figure.update(kind="epochs", series=["train", "test"])
    with pytest.raises(ValueError, match="2 cells"):
        figures.draw(arms, "")
    arms.experiment.figure.update(by=["norm", "images"])
    train, test = figures.draw(arms, "").axes
    drawn = {line.get_label(): line for line in test.get_lines() + train.get_lines()}
    assert list(drawn["ours test BN 2"].get_xdata()) == [1, 2]
    assert list(drawn["ours test BN 2"].get_ydata()) == [46, 41]
    assert list(drawn["ours train GN"].get_ydata()) == [20, 15]


def test_axes_swept_one_at_a_time_have_a_panel_each(arms):
    arms.experiment.figure.update(kind="sweeps", x=["images"], xlabel=["images of a batch"], by=[])
    (panel,) = figures.draw(arms, "").axes
    assert ours(panel) == {"test": [(2, 10), (4, 0)]}
    assert panel.get_xlabel() == "images of a batch"


def test_what_the_papers_said_is_drawn_where_a_figure_shows_a_part():
    """Its sources name the part too, which no line is told apart by."""
    batch = experiments.load("gn_batch")
    found = grid.results(batch, "demo", grid.Grid({}, ()), [])
    papers = {line.get_label() for line in figures.draw(found, "").axes[1].get_lines()}
    assert {"paper test BN 8 workers", "paper test GN 8 workers"} <= papers
