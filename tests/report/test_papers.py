"""The sources' numbers: in a claim's sign, and beside the rows that they are of; five seconds."""

import csv
import io
import math

import pytest

from normlab import experiment
from normlab.experiment import Contrast
from normlab.report import figures, grid, papers, tables
from normlab.report.verdicts import judge


def empty(name: str, scale: str = "demo") -> grid.Results:
    """An experiment of the project, without runs."""
    loaded = experiment.load(name)
    return grid.results(loaded, scale, grid.compose(loaded, scale), [])


def effects(name: str, claim: str) -> list[float]:
    found = empty(name)
    axes = found.experiment.scales["demo"].places
    wanted = found.experiment.claims[claim].contrasts(axes)
    return [round(papers.effect(found, one), 2) for one in wanted]


@pytest.mark.usefixtures("composed_once")
@pytest.mark.parametrize(
    ("name", "claim", "theirs"),
    [
        ("renorm", "br_is_better_than_bn", [1.0]),  # "-1.0 points", in the words of the file
        ("renorm", "gn_is_better_than_br", [2.1]),
        ("frozen", "frozen_wins_at_nbs_2", [7.3]),
        ("frozen", "frozen_loses_at_large_nbs", [0.4, 0.9, 1.0]),
        ("frozen", "frozen_needs_the_nbs_less", [8.2]),
        ("frozen", "precise_statistics_are_better_constants", [math.nan]),  # not the same cell's
        ("feature_evolution", "bn_is_better_than_none", [1.2]),  # where no epoch is named
        ("domain_shift", "target_statistics_help_under_contrast", [math.nan]),  # one level of five
    ],
)
def test_a_papers_effect_has_the_sign_of_ours(name, claim, theirs):
    assert effects(name, claim) == pytest.approx(theirs, nan_ok=True)


def test_the_numbers_of_two_sources_are_not_subtracted(small, results_of):
    (source,) = small.published
    numbers = source.values["test_precise"]
    parts = [
        experiment.Published(label, "nbs", {"test_precise": {nbs: numbers[nbs]}})
        for label, nbs in (("one", 2), ("another", 32))
    ]
    wanted = Contrast("", [(1, "test_precise", {"nbs": 2}), (-1, "test_precise", {"nbs": 32})])
    small.published[:] = parts
    assert math.isnan(papers.effect(results_of([]), wanted))
    small.published[:] = [experiment.Published("one", one.x, one.values) for one in parts]
    assert papers.effect(results_of([]), wanted) == pytest.approx(9.1)


def test_a_verdict_has_the_papers_number_of_the_contrast_that_decides(make_runs, results_of):
    found = results_of(make_runs("desk"))
    falls, worse, _, wins, _ = (judge(one, found) for one in found.experiment.claims.values())
    assert falls.contrasts[-1].published == falls.published == pytest.approx(10.7 - 9.1)
    assert worse.published == pytest.approx(9.1)
    assert math.isnan(wins.published)  # the source has no mini-batch statistics
    csv_lines = list(csv.DictReader(io.StringIO(tables.verdicts_csv([("a", worse), ("a", wins)]))))
    assert [line["published"] for line in csv_lines] == ["9.1", ""]


@pytest.mark.usefixtures("composed_once")
@pytest.mark.parametrize(
    ("name", "column", "rows"),
    [
        ("frozen", "test", 12),  # not those that freeze the EMA's statistics, or weight and bias
        ("norms", "test", 4),  # not the ones on another network
        ("feature_evolution", "test", 3),  # after the training, not in its first epoch
        ("renorm", "test", 3),
        ("precise_samples", "n10", 2),
    ],
)
def test_a_sources_number_stands_where_it_says_and_nowhere_else(name, column, rows):
    found = empty(name)
    beside = [point for point in found.shown if list(papers.published(found, point, column))]
    assert len(beside) == rows
    assert not [p for p in beside if {"constants", "network"} & dict(p).keys()]


@pytest.mark.usefixtures("composed_once")
@pytest.mark.parametrize(
    ("name", "point", "base"),
    [
        (
            "frozen",
            {"norm": "frozen", "constants": "EMA", "nbs": 32},
            {"norm": "BN", "nbs": 32},  # which has no constants
        ),
        ("frozen", {"norm": "frozen", "nbs": 2}, {"norm": "BN", "nbs": 2}),
        (
            "norms",
            {"norm": "Fixup", "lr": "shared", "network": "ResNet-8"},
            {"norm": "BN", "lr": "shared", "network": "ResNet-8"},
        ),
        ("gn_groups", {"groups": 1}, {"groups": 8}),
        (
            "feature_evolution",
            {"norm": "GN", "epoch": "first"},
            {"norm": "BN", "epoch": "first"},
        ),
        ("renorm", {"norm": "GN", "lr": "shared"}, None),  # there is one for each NBS
    ],
)
def test_a_point_on_further_axes_has_the_only_baseline_that_shares_the_others(name, point, base):
    found = empty(name)
    (place,) = [one for one in found.shown if dict(one) == point]
    compared = dict(found.baseline(place) or ())
    if base is None:
        assert compared not in map(dict, found.points)
    else:
        assert compared == base


@pytest.mark.usefixtures("composed_once")
def test_a_papers_points_are_drawn_behind_the_line_they_are_of():
    right = figures.draw(empty("frozen"), "").axes[1]
    theirs = [str(line.get_label()) for line in right.get_lines()]
    assert {name for name in theirs if name.startswith("paper")} == {
        "paper test BN",
        "paper test frozen",
    }
