"""Figures hold the data that was asked for, and their files the same bytes each time."""

import pytest

from normlab.report import figures
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
