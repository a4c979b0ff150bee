"""Numbers of every kind in a report: draws, losses, probes, epochs, facts; about two seconds."""

import csv
import io
import math
import statistics
from dataclasses import replace

import pytest

from normlab import experiment as experiments
from normlab.report import figures, grid, summary, tables
from normlab.report.verdicts import FAILS, HOLDS, NOT_RUN, check, judge

MIXED = """
title: Every kind of column
source: a test
differs: digits in place of ImageNet
set: {}
arms:
  bn: {at: {norm: BN}, set: {norm: bn}}
  gn: {at: {norm: GN}, set: {norm: gn}}
scales: {desk: {axes: {arm: [bn, gn], seed: [100, 101, 102]}}}
protocols:
  test: {eval: "test:ema", label: test}
  loss: {eval: "test:ema", measure: loss, label: loss}
  drawn: {eval: "test:precise", draws: 2, label: drawn}
  spread: {eval: "test:precise", draws: 2, spread: true, label: spread of the draws}
  jumps: {eval: "test:ema", over: jumps, label: jumps}
  low: {probe: features.low, unit: activation, label: lowest}
  high: {probe: features.high, unit: activation, label: highest}
baseline: {column: test}
table: {columns: [test, drawn, loss, low], epochs: [first, last]}
figure: {kind: bars, x: series, xlabel: statistics, by: [norm, epoch], series: [test, drawn]}
published:
  - {label: A paper, at: {epoch: last}, x: norm, values: {test: {BN: 30.0}, drawn: {BN: 28.0}}}
claims:
  falls:
    sentence: The error falls.
    paper: "9"
    kind: direction
    primary: false
    margin: 1
    followup: falls_again
    contrasts: [[[1, test, {norm: BN, epoch: last}], [-1, test, {norm: BN, epoch: first}]]]
  loses:
    sentence: The loss of GN is higher.
    paper: "0.1 nats"
    kind: direction
    primary: false
    margin: 0.01
    contrasts: [[[1, loss, {norm: GN}], [-1, loss, {norm: BN}]]]
facts:
  one_apart:
    sentence: The highest is one above the lowest.
    paper: by construction
    tolerance: 1.5
    contrasts: [[[1, high, {norm: BN}], [-1, low, {norm: BN}]]]
"""


@pytest.fixture
def load(tmp_path, monkeypatch, make_run):
    """The experiment, edited, with its runs: two epochs, tests of 40 and 30 %, GN 5 above."""

    def made(*changed, status="done"):
        text = MIXED
        for old, new in changed:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "mixed.yaml").write_text(text)
        monkeypatch.setattr(experiments, "files", lambda: {"mixed": tmp_path / "mixed.yaml"})
        experiments.load.cache_clear()
        loaded = experiments.load("mixed")
        found = grid.compose(loaded, "desk")
        rows = []
        for key, point in found.points.items():
            above = 5.0 * (dict(point)["norm"] == "GN")
            for seed in (100, 101, 102):
                (run,) = make_run("desk", 2, seed, {}, cell=key, id=f"{key}-{seed}")
                for epoch, error in ((1, 40.0), (2, 30.0)):
                    error += above + seed - 101
                    numbers = {
                        "test:ema": (error, error / 20), "test:precise": (error - 1, 1.0),
                        "test:precise/order:1": (error - 3, 1.0),
                    }  # fmt: skip
                    rows += [
                        run
                        | {"protocol": spec, "epoch": str(epoch), "status": status}
                        | {"error": repr(wrong), "loss": repr(loss)}
                        for spec, (wrong, loss) in numbers.items()
                    ]
                    rows += [
                        run
                        | {"protocol": f"features.{which}", "epoch": str(epoch), "status": status}
                        | {"value": repr(value)}
                        for which, value in (("low", -epoch), ("high", 1.0 - epoch + seed % 2))
                    ]
        return grid.results(loaded, "desk", found, rows)

    return made


BN = (("norm", "BN"),)


def test_numbers_of_every_kind(load):
    found = load()
    assert found.values[BN, "test"] == {100: 29.0, 101: 30.0, 102: 31.0}
    assert found.values[BN, "loss"] == {100: 29 / 20, 101: 30 / 20, 102: 31 / 20}
    assert found.values[BN, "drawn"] == {100: 27.0, 101: 28.0, 102: 29.0}
    assert found.values[BN, "spread"][100] == pytest.approx(statistics.stdev([28.0, 26.0]))
    assert found.values[BN, "jumps"] == {100: 10.0, 101: 10.0, 102: 10.0}
    assert found.values[BN, "low"] == {100: -2.0, 101: -2.0, 102: -2.0}
    assert found.lacking == {}


def test_a_row_of_the_table_may_stand_at_an_epoch(load):
    found = load()
    assert [dict(point) for point in found.shown] == [
        {"norm": norm, "epoch": epoch} for norm in ("BN", "GN") for epoch in ("first", "last")
    ]
    first, last = (("norm", "BN"), ("epoch", "first")), (("norm", "BN"), ("epoch", "last"))
    assert found.sample(first, "test").mean == 40.0
    assert found.sample(last, "test").mean == 30.0
    assert found.change(first, "drawn").mean == -2.0  # to the baseline's column, at the same epoch
    assert found.change(last, "loss").n == 0  # nats are not subtracted from percents


def test_the_tables_have_units_and_both_sides_differences(load):
    numbers, changes = tables.texts(load())
    assert numbers.caption.startswith("In % unless a column says otherwise, mean")
    head = ["norm", "epoch", "n", "test", "paper", "drawn", "paper", "loss (nats)"]
    assert numbers.header == [*head, "lowest (activation)"]
    assert numbers.rows[0][3:5] == ["40.00 ± 2.48", "–"]
    assert numbers.rows[1][3:7] == ["30.00 ± 2.48", "30", "28.00 ± 2.48", "28"]
    assert numbers.rows[1][7:] == ["1.5 ± 0.124", "−2 ± 0"]
    assert "Difference to the same side's own test in points (%) or" in changes.caption
    assert changes.rows[1][3:7] == ["0", "0", "−2.00 ± 0.00", "−2.0"]
    (line,) = [
        line
        for line in csv.DictReader(io.StringIO(tables.table_csv(load())))
        if (line["norm"], line["epoch"], line["protocol"]) == ("BN", "last", "loss")
    ]
    assert (line["unit"], line["value"], line["paper_value"]) == ("nats", "1.5", "")
    assert "- Differs from the paper: digits in place of ImageNet" in tables.markdown(load(), [])


def test_verdicts_have_units_and_a_contradicted_claim_its_followup(load):
    found = load()
    found.values[BN, "test"][100] += 0.1  # what has no spread at all resolves nothing
    found.values[BN, "loss"][100] -= 0.001
    falls, loses = (judge(claim, found) for claim in found.experiment.claims.values())
    assert (falls.verdict, falls.followup) == ("contradicted", "falls_again")
    assert falls.effect == pytest.approx(-10 + 0.1 / 3)
    assert (loses.verdict, loses.claim.unit, loses.followup) == ("reproduced", "nats", "")
    assert loses.effect == pytest.approx(0.25 + 0.001 / 3)
    lines = summary.read(tables.verdicts_csv([("mixed", falls), ("mixed", loses)]))
    assert [line["unit"] for line in lines] == ["points", "nats"]
    assert [line["followup"] for line in lines] == ["falls_again", ""]
    spoken = replace(falls.claim, followup={"demo": "falls_again"})
    assert replace(falls, claim=spoken).followup == ""  # that is said of another scale
    assert replace(falls, claim=spoken, scale="demo").followup == "falls_again"
    assert summary.effect(lines[1]) == "+0.25 [0.249, 0.252] nats"


def test_measured_numbers_without_spread_resolve_nothing(load):
    """The losses' differences are all 0.25, but for rounding; nor are two arms equal at chance."""
    (*_, loses) = load().experiment.claims.values()
    one = judge(loses, load())
    assert (one.verdict, one.p, one.effect) == ("not resolved", 1.0, pytest.approx(0.25))
    assert "no spread over the seeds gives no interval" in one.notes
    (line,) = summary.read(tables.verdicts_csv([("mixed", one)]))
    assert summary.effect(line) == "+0.25 nats"
    same = replace(loses, kind="equivalence", margin=0.5)
    assert judge(same, load(status="diverged")).verdict == "not resolved"


@pytest.mark.parametrize(
    ("terms", "unit", "verdict"),
    [
        ([[1, "low", {"norm": "BN"}]], "activation", "contradicted"),  # -2 in every seed
        ([[1, "low", {"norm": "BN"}]], "%", "not resolved"),
        (
            [[1, "high", {"norm": "BN"}], [-1, "high", {"norm": "GN"}]],
            "activation",
            "not resolved",  # they differ between the seeds, their difference does not
        ),
    ],
)
def test_a_count_is_exact_without_spread(load, terms, unit, verdict):
    found = load(("unit: activation", f"unit: '{unit}'"))
    (claim, _) = found.experiment.claims.values()
    one = judge(replace(claim, spec={"contrasts": [terms]}), found)
    assert one.verdict == verdict
    assert (one.low == one.high == -2.0) is (verdict == "contradicted")


def test_a_fact_holds_where_it_does_in_every_seed(load):
    """high - low is 1 in even seeds and 2 in the odd one."""
    found = load()
    fails = check(found.experiment.facts["one_apart"], found)
    assert (fails.outcome, fails.worst, fails.n) == (FAILS, 2.0, 3)
    holds = load(("tolerance: 1.5", "tolerance: 2"))
    assert check(holds.experiment.facts["one_apart"], holds).outcome == HOLDS
    nothing = load(("norm: BN}], [-1, low", "norm: GN}], [-1, low"))
    nothing.values.clear()
    assert check(nothing.experiment.facts["one_apart"], nothing).outcome == NOT_RUN


def test_a_diverged_run_scores_a_guess_or_has_no_number(load):
    found = load(status="diverged")
    assert found.values[BN, "test"] == {100: 90.0, 101: 90.0, 102: 90.0}
    assert found.values[BN, "loss"][100] == pytest.approx(math.log(10))  # ten classes
    assert found.values[BN, "jumps"][101] == pytest.approx((10 + 60) / 2)
    assert (BN, "low") not in found.values
    assert (BN, "spread") not in found.values
    assert found.lacking == {}  # nothing can be evaluated any more


def test_an_epoch_without_every_draw_has_no_number(load):
    found = load(("draws: 2, label", "draws: 3, label"))
    assert (BN, "drawn") not in found.values
    assert found.lacking[BN] == [100, 101, 102]


def test_epochs_that_were_not_asked_for_count_nowhere(load, monkeypatch):
    monkeypatch.setattr(grid, "asked_epochs", lambda _: frozenset({2, 3}))
    found = load()
    assert set(found.along(BN, "test")) == {2}
    assert found.lacking[BN] == [100, 101, 102]  # epoch 3
    assert found.numbers((*BN, ("epoch", "first")), "test")[101] == 30.0


def test_the_epochs_of_a_config():
    config = {"epochs": 10, "eval_last": 2, "eval_at": [0, 3], "task": {"name": "classifier"}}
    assert grid.asked_epochs(config) == {0, 3, 9, 10}
    assert grid.asked_epochs({**config, "eval_last": 99, "eval_at": []}) == set(range(1, 11))
    assert grid.asked_epochs({**config, "task": {"name": "gan"}}) == frozenset()


# -- figures --------------------------------------------------------------------------------------


def test_bars_of_columns(load):
    """Four bars a group, with the papers' changes beside ours and nowhere else."""
    figure = figures.draw(load(), "n = 3 seeds")
    left, right = figure.axes
    assert left.get_ylabel() == "error (%)"
    assert right.get_ylabel() == "change (percentage points)"
    heights = [[bar.get_height() for bar in group] for group in left.containers if len(group) == 2]
    assert heights == [[40, 38], [30, 28], [45, 43], [35, 33]]
    colours = {group[0].get_facecolor() for group in left.containers if len(group) == 2}
    assert len(colours) == 2  # one for each norm
    hatches = [group[0].get_hatch() for group in left.containers if len(group) == 2]
    assert hatches == [None, "///", None, "///"]  # and for each of its epochs another filling
    theirs = [line for line in right.get_lines() if line.get_marker() == "D"]
    assert [list(line.get_ydata()) for line in theirs] == [[0.0, -2.0]]
    assert not [line for line in left.get_lines() if line.get_marker() == "D"]
    assert [text.get_text() for text in left.get_xticklabels()] == ["test", "drawn"]


def test_bars_over_an_axis(load):
    found = load(
        ("x: series, xlabel: statistics, by: [norm, epoch]", "x: norm, xlabel: norm, by: [epoch]")
    )
    left = figures.draw(found, "").axes[0]
    heights = [[bar.get_height() for bar in group] for group in left.containers if len(group) == 2]
    assert heights == [[40, 45], [38, 43], [30, 35], [28, 33]]


def test_several_cells_to_a_bar_are_refused(load):
    with pytest.raises(ValueError, match=r"figure.by: 2 cells are one line, {'norm': 'BN'}"):
        figures.draw(load(("by: [norm, epoch]", "by: [norm]")), "")


def test_points_of_two_columns(load):
    kind = "kind: scatter, x: test, xlabel: test, by: [norm, epoch], series: [drawn]"
    found = load(
        (
            "kind: bars, x: series, xlabel: statistics, by: [norm, epoch], series: [test, drawn]",
            kind,
        )
    )
    left, right = figures.draw(found, "").axes
    points = [tuple(bar[0].get_xydata()[0]) for bar in left.containers]
    assert points == [(40, 38), (30, 28), (45, 43), (35, 33)]
    hollow = [line for line in right.get_lines() if line.get_markerfacecolor() == "white"]
    assert [tuple(line.get_xydata()[0]) for line in hollow] == [(0, -2)]


def test_bands_over_the_epochs(load):
    found = load(
        ("kind: bars, x: series, xlabel: statistics, by: [norm, epoch], series: [test, drawn]",
         "kind: bands, x: epoch, xlabel: epoch, by: [norm], series: [low, high]"),
        (", epochs: [first, last]}", "}"),
    )  # fmt: skip
    bn, gn = figures.draw(found, "").axes
    assert (bn.get_title("left"), gn.get_title("left")) == ("BN", "GN")
    assert bn.get_ylabel() == "activation"
    low, high = (list(line.get_ydata()) for line in bn.get_lines())
    assert low == [-1, -2]
    assert high == pytest.approx([1 / 3, -2 / 3])  # one seed of three is one higher


def test_lines_of_their_own_across_the_bands(load):
    kind = "kind: bands, x: epoch, xlabel: epoch, by: [norm], series: [low, high]"
    bars = "kind: bars, x: series, xlabel: statistics, by: [norm, epoch], series: [test, drawn]"
    found = load((bars, f"{kind}, lines: [high]"), (", epochs: [first, last]}", "}"))
    drawn = figures.draw(found, "")
    *_, high, own = drawn.axes[0].get_lines()
    assert list(own.get_ydata()) == list(high.get_ydata())
    assert own.get_color() != high.get_color()
    label = found.experiment.protocols["high"].label
    assert [text.get_text() for text in drawn.legends[0].get_texts()][-1] == label
    with pytest.raises(ValueError, match=r"figure.lines: are of a figure of bands, at most 2"):
        load((bars, f"{kind}, lines: [low, high, low]"), (", epochs: [first, last]}", "}"))
    with pytest.raises(ValueError, match=r"figure.series: one axis for columns of different"):
        load((bars, f"{kind}, lines: [test]"), (", epochs: [first, last]}", "}"))


def test_a_norm_has_its_colour_wherever_it_stands():
    both = figures.looks([{"norm": "GN"}, {"norm": "BN"}])
    alone = figures.looks([{"norm": "BN", "lr": "tuned"}, {"norm": "BN", "lr": "shared"}])
    assert both[1]["color"] == alone[0]["color"] == alone[1]["color"] == figures.NORMS["BN"]
    assert both[0]["color"] == figures.NORMS["GN"]
    assert alone[0]["linestyle"] != alone[1]["linestyle"]
    assert len(set(figures.NORMS.values())) == len(figures.NORMS)


def test_a_norm_on_another_axis_has_its_colour_and_nobody_else_has():
    arms = [{"protocol": one} for one in ("shuffled", "pattern", "GN", "none")]
    shuffled, pattern, gn, none = (look["color"] for look in figures.looks(arms))
    assert gn == figures.NORMS["GN"]
    assert len({shuffled, pattern, gn, none}) == 4
    eight = figures.looks([{"column": str(i)} for i in range(8)])
    assert len({look["color"] for look in eight}) == 8


def test_panels_over_the_epochs_share_their_numbers_and_have_intervals(load):
    found = load(
        ("kind: bars, x: series, xlabel: statistics, by: [norm, epoch]",
         "kind: epochs, x: epoch, xlabel: epoch, by: [norm]"),
        (", epochs: [first, last]}", "}"),
    )  # fmt: skip
    left, right = figures.draw(found, "").axes
    assert left.get_ylim() == right.get_ylim()
    (bn, _) = left.collections
    half = found.sample(BN, "test").half()
    heights = bn.get_paths()[0].vertices[:, 1]
    assert heights.min() == pytest.approx(30 - half)
    assert heights.max() == pytest.approx(40 + half)


@pytest.mark.parametrize("name", experiments.names())
def test_every_norm_of_an_experiment_has_a_colour(name):
    """Else it would borrow another one's."""
    scales = experiments.load(name).scales.values()
    assert {n for grid in scales for n in grid.places.get("norm", [])} <= figures.NORMS.keys()
