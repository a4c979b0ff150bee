"""A run's number, what may be pooled, and what is missing."""

import math

import pytest
from compositions import composed

from normlab import config, experiment
from normlab.experiment import Contrast
from normlab.report import grid, provenance
from normlab.report.gather import Row
from normlab.report.grid import curve_of, run_number

SOURCE_TODAY = "5ea50de1"
PRECISE = experiment.Protocol("", ("test:precise",), "error", "%")


def number(run: list[Row], scale: str, column: experiment.Protocol = PRECISE) -> float:
    return run_number(run[0], curve_of(run, column), column, scale)


def point(nbs: int) -> grid.Point:
    return (("nbs", nbs),)


def test_the_last_epoch_counts_at_desk(make_run):
    run = make_run("desk", 2, 100, {"test_precise": [50.0, 39.0, 40.0]})
    assert number(run, "desk") == 40.0


def test_the_median_of_the_last_five_counts_at_gpu(make_run):
    run = make_run("gpu", 2, 100, {"test_precise": [1.0, 9.0, 5.0, 7.0, 6.0, 30.0]})
    assert number(run, "gpu") == 7.0


@pytest.mark.parametrize("scale", ["gpu", "paper"])
def test_fewer_than_five_epochs_are_no_median_of_five(make_run, scale):
    run = make_run("gpu", 2, 100, {"test_precise": [9.0, 5.0, 7.0, 6.0]})
    assert math.isnan(number(run, scale))


def test_a_run_of_too_few_evaluated_epochs_lacks_them(make_run, results_of):
    errors = dict.fromkeys(("train_batch", "test_batch", "test_precise"), [5.0] * 5)
    rows = make_run("gpu", 2, 100, errors)
    rows += make_run("gpu", 2, 101, errors | {"test_precise": [5.0] * 4})
    found = results_of(rows, "gpu")
    assert found.values[point(2), "test_precise"] == {100: 5.0}
    assert found.lacking == {point(2): [101]}
    assert ("NBS 2: seeds 101, evaluations", "normlab sweep small scale=gpu nbs=2 seed=101") in (
        provenance.missing(found)
    )


def test_every_missing_cell_names_the_command_that_fills_it(make_run, results_of):
    rows = [row for s in (100, 102) for row in make_run("gpu", 2, s, {"test_precise": 4.0})]
    assert provenance.missing(results_of(rows, "gpu"))[:2] == [
        ("NBS 2: seeds 101, 103-104", "normlab sweep small scale=gpu nbs=2 seed=101,103,104"),
        ("NBS 8: seeds 100-104", "normlab sweep small scale=gpu nbs=8"),
    ]


def test_a_run_of_two_sources_differs_from_todays(make_run, results_of):
    """A run that was resumed under other code."""
    rows = make_run("desk", 2, 100, {}, source=f"01d50cce+{SOURCE_TODAY}")
    rows += make_run("desk", 2, 101, {}, source=f"{SOURCE_TODAY}+01d50cce")
    rows += make_run("desk", 2, 102, {})
    marks = provenance.marks(results_of(rows), SOURCE_TODAY)
    assert "made by a source that differs from today's: 2 of 3 runs" in marks


def test_rows_in_any_order_give_the_same_number(make_run):
    run = make_run("gpu", 2, 100, {"test_precise": [1.0, 9.0, 5.0, 7.0, 6.0, 30.0]})
    assert number(run[::-1], "gpu") == 7.0


def test_draws_of_one_epoch_are_averaged(make_run):
    run = make_run("desk", 2, 100, {"test_precise": 40.0})
    again = [row | {"order": "1", "error": "41.0"} for row in run]
    assert number(run + again, "desk") == 40.5


def test_a_diverged_run_scores_chance(make_run, results_of):
    rows = make_run("desk", 2, 100, {"test_precise": 12.0}, status="diverged", chance="90.0")
    found = results_of(rows)
    assert found.values[point(2), "test_precise"] == {100: 90.0}
    assert found.values[point(2), "train_batch"] == {100: 90.0}
    assert (found.diverged, found.lacking) == (1, {})


def test_a_diverged_run_has_chance_error_where_the_others_of_its_arm_have_epochs(
    make_run, results_of
):
    rows = make_run("desk", 2, 100, {"test_precise": [50.0, 45.0, 40.0]})
    (first, *_) = make_run("desk", 2, 101, {"test_precise": [52.0, 1.0, 1.0]}, status="diverged")
    found = results_of([*rows, first]).by_epoch[point(2), "test_precise"]
    assert found == {
        1: {100: 50.0, 101: 52.0},
        2: {100: 45.0, 101: 90.0},
        3: {100: 40.0, 101: 90.0},
    }
    alone = results_of([first, *make_run("desk", 8, 100, {"test_precise": [50.0, 45.0, 40.0]})])
    assert alone.by_epoch[point(2), "test_precise"] == {
        1: {101: 52.0},
        2: {101: 90.0},
        3: {101: 90.0},
    }


def test_a_curve_has_the_epochs_and_the_seeds_that_all_its_numbers_have(make_run, results_of):
    rows = make_run("desk", 2, 100, {"test_precise": [50.0, 45.0, 40.0]})
    rows += make_run("desk", 2, 101, {"test_precise": [46.0, 41.0]})
    rows += make_run("desk", 2, 102, {"train_batch": [9.0, 8.0, 7.0]})
    found = results_of(rows).by_epoch[point(2), "test_precise"]
    assert found == {2: {100: 45.0, 101: 46.0}, 3: {100: 40.0, 101: 41.0}}


def test_a_failed_run_is_missing_and_counted(make_run, results_of):
    rows = make_run("desk", 2, 100, {}, status="failed")
    rows += make_run("desk", 2, 101, {"test_precise": 40.0})
    found = results_of(rows)
    assert found.failed == 1
    assert 100 in found.missing[point(2)]
    assert 101 not in found.missing[point(2)]


def test_seeds_that_the_experiment_does_not_name_are_not_judged(make_run, results_of):
    """Seeds 0-9 chose the settings: they may not judge them."""
    rows = make_run("desk", 2, 0, {"test_precise": 10.0}) + make_run(
        "desk", 2, 100, {"test_precise": 40.0}
    )
    assert results_of(rows).values[point(2), "test_precise"] == {100: 40.0}


@pytest.mark.parametrize(
    "other", [{"torch": "2.15.0"}, {"device": "cuda"}, {"data_digest": "0ther"}]
)
def test_environments_are_never_pooled(make_run, results_of, other):
    rows = [row for seed in (100, 101) for row in make_run("desk", 2, seed, {"test_precise": 40.0})]
    rows += make_run("desk", 2, 102, {"test_precise": 90.0}, **other)
    found = results_of(rows)
    assert found.values[point(2), "test_precise"] == {100: 40.0, 101: 40.0}
    assert list(found.others.values()) == [1]


def test_the_most_complete_environment_is_judged_failures_not_counted(make_run, results_of):
    rows = [row for s in (100, 101) for row in make_run("desk", 2, s, {}, status="failed")]
    rows += make_run("desk", 2, 102, {"test_precise": 40.0}, torch="2.15.0")
    found = results_of(rows)
    assert found.environment is not None
    assert found.environment.torch == "2.15.0"


def test_a_second_run_of_a_cell_and_seed_is_left_out_and_counted(make_run, results_of):
    rows = make_run("desk", 2, 100, {"test_precise": 40.0}, started="2026-01-01")
    rows += make_run("desk", 2, 100, {"test_precise": 10.0}, started="2026-01-02", id="other")
    for order in (rows, rows[::-1]):
        found = results_of(order)
        assert found.values[point(2), "test_precise"] == {100: 40.0}
        assert found.surplus == 1


def test_a_run_without_an_evaluation_lacks_it(make_run, results_of):
    found = results_of(make_run("desk", 2, 100, {"test_precise": 40.0}))
    assert found.lacking == {point(2): [100]}
    assert not found.complete


def test_changes_are_paired(make_run, results_of):
    rows = make_run("desk", 2, 100, {"test_precise": 45.0})
    rows += make_run("desk", 2, 101, {"test_precise": 55.0})
    rows += make_run("desk", 32, 100, {"test_precise": 40.0})
    rows += make_run("desk", 32, 101, {"test_precise": 50.0})
    rows += make_run("desk", 32, 102, {"test_precise": 0.0})
    change = results_of(rows).change(point(2), "test_precise")
    assert (change.n, change.mean, change.sd) == (2, 5.0, 0.0)


def test_a_grid_that_cannot_be_composed_says_why(small, monkeypatch):
    def refuse(*_: object) -> list[dict[str, object]]:
        raise ValueError("nbs=2: no such thing\nsecond line")

    monkeypatch.setattr(grid.config, "compose_each", refuse)
    found = grid.compose(small, "desk")
    assert found.points == {}
    assert found.problem == "its cells cannot be composed: nbs=2: no such thing"


@pytest.mark.usefixtures("composed_once")
def test_the_real_experiments_compose_into_distinct_cells():
    for name in experiment.names():
        loaded = experiment.load(name)
        for scale in ("demo", "paper"):
            found = grid.compose(loaded, scale)
            assert not found.problem
            assert len(found.points) == len(grid.first_cells(loaded, scale))


@pytest.mark.parametrize("scale", ["demo", "desk", "gpu", "paper"])
def test_experiments_that_share_a_run_evaluate_the_same_epochs(scale):
    """Whichever made the run first, the other needs epochs whose weights are gone by then."""
    epochs: dict[str, dict[int, str]] = {}
    for name in experiment.names():
        loaded = experiment.load(name)
        for point, overrides in grid.first_cells(loaded, scale).items():
            cell = composed(*overrides)
            shared = epochs.setdefault(config.cell_key(cell), {})
            shared.setdefault(cell["eval_last"], f"{name} {point}")
    assert not [wanted for wanted in epochs.values() if len(wanted) > 1]


def test_the_seed_is_no_part_of_a_cell():
    loaded = experiment.load("nbs")
    first, second = loaded.cells("demo")[:2]
    assert first.axes["seed"] != second.axes["seed"]
    keys = {config.cell_key(composed(*cell.overrides)) for cell in (first, second)}
    assert len(keys) == 1


def test_chance_without_a_record_is_nan(make_run):
    run = make_run("desk", 2, 100, {}, status="diverged", chance="")
    assert math.isnan(number(run, "desk"))


@pytest.mark.usefixtures("composed_once")
def test_a_term_names_the_cell_that_stands_exactly_there_or_the_only_one():
    norms = experiment.load("norms")
    found = grid.results(norms, "demo", grid.compose(norms, "demo"), [])

    def read(**cell: str):
        return found.contrast(Contrast("", [(1.0, "test", cell)]))

    assert read(norm="BN", lr="shared") == {}  # and not the one on another network
    assert read(network="ResNet-8", norm="Fixup") == {}
    with pytest.raises(ValueError, match="names 3 cells"):
        read(norm="BN")


@pytest.mark.usefixtures("composed_once")
def test_a_figure_draws_only_what_it_says():
    norms = experiment.load("norms")
    found = grid.results(norms, "demo", grid.compose(norms, "demo"), [])
    assert {dict(point)["lr"] for point in found.points} == {"shared", "tuned"}
    assert {dict(point)["lr"] for point in found.drawn} == {"shared"}
    assert len(found.drawn) < len(found.points)
