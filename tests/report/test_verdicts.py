"""The rules of a verdict: by hand, and by how often they are wrong."""

import random

import numpy as np
import pytest

from normlab.report import verdicts
from normlab.report.grid import Results
from normlab.report.statistics import Sample
from normlab.report.verdicts import Verdict, judge_direction, judge_equivalence


def sample(low: float, high: float, n: int = 10) -> Sample:
    """Ten seeds whose 95 % interval is [low, high]: t(0.975; 9) = 2.262157."""
    half = (high - low) / 2
    return Sample(n, (low + high) / 2, half * n**0.5 / 2.262157)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.6, 2.0, "reproduced"),
        (0.4, 2.0, "not resolved"),
        (-2.0, -0.6, "contradicted"),
        (-2.0, -0.4, "not resolved"),
        (-0.4, 0.4, "negligible"),
        (0.1, 0.4, "negligible"),
        (-0.6, 0.4, "not resolved"),
    ],
)
def test_direction_is_where_the_interval_lies(low: float, high: float, verdict: str):
    assert judge_direction(sample(low, high), 0.5)[0] == verdict


# The 90 % interval is 1.833113 / 2.262157 = 0.8103 as wide as the 95 % one.
@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.4, 0.4, "reproduced"),
        (-0.61, 0.61, "reproduced"),  # 90 %: +-0.494
        (-0.62, 0.62, "not resolved"),  # 90 %: +-0.502
        (0.51, 1.0, "contradicted"),
        (-1.0, -0.51, "contradicted"),
        (0.49, 1.0, "not resolved"),  # the 90 % interval lies outside, the 95 % one does not
    ],
)
def test_equivalence_is_two_one_sided_tests(low: float, high: float, verdict: str):
    assert judge_equivalence(sample(low, high), 0.5)[0] == verdict


def test_one_seed_resolves_nothing():
    assert judge_direction(Sample.of([9.0]), 0.5)[0] == "not resolved"
    assert judge_equivalence(Sample.of([0.0]), 0.5)[0] == "not resolved"


@pytest.mark.parametrize("truth", [0.5, -0.5])
def test_how_often_direction_is_wrong_at_the_margin(truth: float):
    """At the margin itself "beyond it" is false: it may be said in at most 2.5 % of the cases."""
    generator = np.random.default_rng(7)
    told = [
        judge_direction(Sample.of(generator.normal(truth, 1.0, 10)), 0.5)[0] for _ in range(4000)
    ]
    wrong = told.count("reproduced" if truth > 0 else "contradicted") / len(told)
    assert 0.015 < wrong < 0.035


def test_how_often_equivalence_is_wrong_at_the_margin():
    """TOST: at most 5 %, and close to it where the spread is small beside the margin."""
    generator = np.random.default_rng(8)
    told = [
        judge_equivalence(Sample.of(generator.normal(0.5, 0.2, 10)), 0.5)[0] for _ in range(4000)
    ]
    assert 0.035 < told.count("reproduced") / len(told) < 0.065


def test_how_often_a_true_difference_of_nothing_is_resolved_wrongly():
    generator = np.random.default_rng(9)
    told = [judge_direction(Sample.of(generator.normal(0, 1, 10)), 0.0)[0] for _ in range(4000)]
    resolved = told.count("reproduced") + told.count("contradicted")
    assert 0.035 < resolved / len(told) < 0.065


def judged(*every: Results) -> list[Verdict]:
    """The first one's verdicts, beside the other experiments of the scale."""
    return verdicts.judge_all(every)[0]


def by_name(found: list[Verdict]) -> dict[str, Verdict]:
    return {one.claim.name: one for one in found}


def test_the_verdicts_of_a_whole_scale(make_runs, results_of):
    found = by_name(judged(results_of(make_runs("desk"))))
    assert {name: one.verdict for name, one in found.items()} == {
        "train_error_falls": "reproduced",
        "small_is_worse": "reproduced",
        "bottom_is_flat": "reproduced",
        "population_wins": "not resolved",
        "largest_is_worse": found["largest_is_worse"].verdict,
    }
    assert {one.n for one in found.values()} == {10}
    assert found["small_is_worse"].label == "primary"
    assert found["largest_is_worse"].label == "exploratory"
    assert found["bottom_is_flat"].level == 90
    assert found["small_is_worse"].level == 95


def test_a_shape_shows_the_contrast_that_decides(make_runs, results_of):
    one = by_name(judged(results_of(make_runs("desk"))))["train_error_falls"]
    assert [c.label for c in one.contrasts][-1] == "+train_batch(nbs=32) -train_batch(nbs=128)"
    assert one.effect == pytest.approx(one.contrasts[-1].sample.mean)  # 3 points, the smallest step
    assert one.p == max(c.p_for for c in one.contrasts)
    assert "3 of 3 contrasts hold" in one.notes[-1]


def test_the_seeds_shown_are_those_of_the_contrast_that_decides(make_runs, results_of):
    rows = [row for row in make_runs("desk") if (row["nbs"], row["seed"]) != ("2", "109")]
    one = by_name(judged(results_of(rows)))["train_error_falls"]
    assert [c.sample.n for c in one.contrasts] == [9, 10, 10]
    assert one.effect == one.contrasts[-1].sample.mean
    assert one.n == 10
    assert one.label == "exploratory"
    assert "9 of the 10 seeds" in one.notes[-1]


def test_one_contradicted_contrast_contradicts_a_shape(make_runs, results_of):
    rows = [
        row
        | ({"error": "30.0"} if row["nbs"] == "128" and row["protocol"] == "train:batch" else {})
        for row in make_runs("desk")
    ]
    one = by_name(judged(results_of(rows)))["train_error_falls"]
    assert one.verdict == "contradicted"
    assert one.effect < 0
    assert one.p == pytest.approx(3 * min(c.p_against for c in one.contrasts))


def test_a_verdict_that_does_not_survive_holm_is_not_resolved(make_run, results_of):
    """NBS 2 against 32: p about 0.03 alone, times the four primary claims of the scale."""
    rows = []
    for i, seed in enumerate(range(100, 110)):
        rows += make_run("desk", 2, seed, {"test_precise": 41.15 + (i - 4.5) * 0.28})
        rows += make_run("desk", 32, seed, {"test_precise": 40.0})
    one = by_name(judged(results_of(rows)))["small_is_worse"]
    assert 0.0125 < one.p < 0.05
    assert one.p_holm == pytest.approx(4 * one.p)
    assert one.verdict == "not resolved"
    assert one.notes[0] == "reproduced alone, but does not survive Holm's correction"


def test_holm_corrects_over_all_experiments_of_a_scale(make_run, results_of):
    rows = []
    for i, seed in enumerate(range(100, 110)):
        rows += make_run("desk", 2, seed, {"test_precise": 42.0 + i * 0.1})
        rows += make_run("desk", 32, seed, {"test_precise": 40.0})
    found, shared = results_of(rows), results_of(rows[:1])
    started = results_of(make_run("desk", 2, 100, {"test_batch": 41.0, "test_precise": 40.0}))
    alone = by_name(judged(found))["small_is_worse"]
    assert alone.p_holm == pytest.approx(4 * alone.p)
    beside = by_name(judged(found, started))["small_is_worse"]
    assert beside.p_holm == pytest.approx(8 * alone.p)
    # Without runs, or with one that none of its primary claims can be judged by, it asks nothing.
    for silent in (results_of([]), shared):
        assert repr(judged(found, silent)) == repr(judged(found))  # nan is no equal of itself


def test_shuffling_rows_changes_nothing(make_runs, results_of):
    rows = make_runs("desk")
    shuffled = random.Random(3).sample(rows, len(rows))
    assert repr(judged(results_of(shuffled))) == repr(judged(results_of(rows)))


def test_less_than_ten_seeds_are_exploratory(make_runs, results_of):
    rows = [row for row in make_runs("desk") if row["seed"] != "109"]
    one = by_name(judged(results_of(rows)))["small_is_worse"]
    assert (one.n, one.label) == (9, "exploratory")
    assert "9 of the 10 seeds" in one.notes[-1]


def test_claims_edited_after_the_runs_are_exploratory(make_runs, results_of):
    one = by_name(judged(results_of(make_runs("desk", claims="small:00000000"))))["small_is_worse"]
    assert one.label == "exploratory"
    assert one.notes[0] == "exploratory: declared or edited after 40 of the runs"


@pytest.mark.parametrize("claims", ["", "another:c1a15ed0"])
def test_claims_declared_after_the_runs_are_exploratory(make_runs, results_of, claims):
    one = by_name(judged(results_of(make_runs("desk", claims=claims))))["small_is_worse"]
    assert one.label == "exploratory"


def test_a_run_that_another_experiment_asked_for_judges_as_well(make_runs, results_of):
    rows = make_runs("desk", experiment="another")
    assert by_name(judged(results_of(rows)))["small_is_worse"].label == "primary"


def test_no_runs_are_not_run(results_of):
    found = judged(results_of([]))
    assert {one.verdict for one in found} == {"not run"}
    assert {one.n for one in found} == {0}


def test_a_shape_with_a_missing_cell_is_not_run_and_says_how_much_is(make_runs, results_of):
    rows = [row for row in make_runs("desk") if row["nbs"] != "128"]
    one = by_name(judged(results_of(rows)))["train_error_falls"]
    assert one.verdict == "not run"
    assert one.notes == ("2 of 3 contrasts have runs",)


def test_claims_that_are_not_run_count_in_the_correction(make_run, results_of):
    rows = []
    for i, seed in enumerate(range(100, 110)):
        rows += make_run("desk", 2, seed, {"test_precise": 42.0 + i * 0.1})
        rows += make_run("desk", 32, seed, {"test_precise": 40.0})
    one = by_name(judged(results_of(rows)))["small_is_worse"]
    assert one.p_holm == pytest.approx(4 * one.p)
