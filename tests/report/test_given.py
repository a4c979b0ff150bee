"""Networks that the user gives: rows, what repeats a measurement, and what may be claimed."""

import math

import pytest

from normlab import experiment
from normlab.report import given, grid, provenance, tables
from normlab.report.gather import Row
from normlab.report.verdicts import check, judge
from normlab.runs import COLUMNS

BATCH = experiment.load("precise_batch")


def run(weights: str, seed: int, errors: dict[str, float], **changed: str) -> list[Row]:
    """A run of given weights; errors: column -> error in %, its loss a hundredth of that."""
    about = dict.fromkeys(COLUMNS, "") | {
        "id": f"resnet50@{weights}-{seed}", "cell": f"cell-{weights}", "scale": "pretrained",
        "model": f"resnet50@{weights}", "norm": "ghost", "nbs": "32", "seed": str(seed),
        "torch": "2.11.0", "device": "cpu", "data_digest": "d1935700", "status": "done",
        "epoch": "0", "claims": f"precise_batch:{BATCH.claims_digest('pretrained')}",
    } | changed  # fmt: skip
    rows = []
    for column, error in errors.items():
        (spec,) = BATCH.protocols[column].specs
        rows.append(about | {"protocol": spec, "error": repr(error), "loss": repr(error / 100)})
    return rows


def found(rows: list[Row]) -> grid.Results:
    return grid.results(BATCH, "pretrained", grid.compose(BATCH, "pretrained", rows), rows)


def drawn(weights: str, base: float, **changed: str) -> list[Row]:
    """Ten draws of one network; with batches of 2 it is five points worse."""
    of_draw = [base + 0.01 * draw for draw in range(10)]
    return [
        row
        for draw, error in enumerate(of_draw)
        for row in run(
            weights, 100 + draw, {"b2": error + 5 + 0.02 * draw, "b100": error}, **changed
        )
    ]


CLAIM = BATCH.claims["two_are_too_few"]
POINT = (("nbs", 32), ("model", "resnet50"))


def test_the_draws_of_one_network_count_and_no_claim_is_of_trainings():
    results = found(drawn("0676ba61", 24.0))
    assert (results.points, results.repeated) == ([POINT], given.DRAWS)
    assert results.sample(POINT, "b100").n == 10
    assert results.sample(POINT, "b100").mean == pytest.approx(24.045)
    verdict = judge(CLAIM, results)
    assert (verdict.verdict, verdict.n, verdict.label) == ("reproduced", 10, "exploratory")
    assert "exploratory: n counts draws of one network, and no trainings" in verdict.notes
    assert verdict.published == pytest.approx(5.3)  # beside what the paper has at this NBS
    assert "over draws of one network" in tables.texts(results)[0].caption
    assert "n = 10 draws of one network" in provenance.subtitle(results)


def test_several_networks_count_once_each_with_the_mean_of_their_draws():
    results = found(drawn("0676ba61", 24.0) + drawn("11ad3fa6", 20.0) + drawn("00000001", 22.0))
    assert (results.points, results.repeated) == ([POINT], given.NETWORKS)
    numbers = sorted(results.numbers(POINT, "b100").values())
    assert numbers == pytest.approx([20.045, 22.045, 24.045])
    verdict = judge(CLAIM, results)
    assert (verdict.n, verdict.label) == (3, "exploratory")
    assert "exploratory: 3 of the 10 networks of a primary claim" in verdict.notes
    assert "n = 3 networks" in provenance.subtitle(results)


def test_ten_networks_are_enough_for_a_primary_claim():
    rows = [r for i in range(10) for r in drawn(f"{i:08x}", 20.0 + i)]
    verdict = judge(CLAIM, found(rows))
    assert (verdict.n, verdict.label) == (10, "primary")


def test_models_are_rows_of_their_own():
    small = drawn("f37072fd", 30.0, model="resnet18@f37072fd")
    results = found(drawn("0676ba61", 24.0) + small)
    assert [dict(point)["model"] for point in results.points] == ["resnet18", "resnet50"]
    assert results.repeated == given.DRAWS
    assert judge(CLAIM, results).verdict == "not run"  # which of them is not said


def test_a_network_that_was_trained_otherwise_makes_further_claims_readable():
    at_32 = drawn("0676ba61", 24.0)
    assert "reads nbs=2" in judge(BATCH.claims["two_are_too_few_at_nbs_2"], found(at_32)).notes[0]
    both = found(at_32 + drawn("0000000a", 32.0, nbs="2"))
    assert len(both.points) == 2
    assert judge(BATCH.claims["two_are_too_few_at_nbs_2"], both).verdict == "reproduced"
    assert check(BATCH.facts["layer_by_layer_is_flat"], both).note == ""


def test_the_same_network_under_other_settings_is_not_counted_twice():
    other = drawn("0676ba61", 90.0, cell="another", started="later")
    results = found(drawn("0676ba61", 24.0) + [row | {"id": f"b{row['id']}"} for row in other])
    assert (results.surplus, results.sample(POINT, "b100").mean) == (10, pytest.approx(24.045))


def test_what_was_trained_here_or_otherwise_is_no_row():
    for changed in ({"model": "resnet50"}, {"scale": "paper"}, {"norm": "bn"}):
        assert found(drawn("0676ba61", 24.0, **changed)).points == []
    assert math.isnan(judge(CLAIM, found([])).effect)


def test_missing_draws_are_filled_by_a_command_that_leaves_the_weights_to_the_user():
    rows = [row for row in drawn("0676ba61", 24.0) if row["seed"] not in ("103", "104")]
    missing = provenance.missing(found(rows))
    command = "normlab sweep precise_batch scale=pretrained init_from=weights.pth nbs=32"
    assert missing[0] == ("NBS 32, model resnet50: seeds 103-104", f"{command} seed=103,104")
