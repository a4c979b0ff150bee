"""Columns of every kind, facts, and cells with an epoch: what is read of them and what is refused.

All of it takes about a second.
"""

import csv
import math
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from normlab import experiment
from normlab.experiment import entry

RESULTS = Path(__file__).resolve().parent.parent / "results"

MIXED = """
title: Every kind of column
source: a test
differs: 8x8 digits in place of ImageNet
set: {epochs: 3}
scales: {demo: {axes: {nbs: [2, 4], seed: [100, 101]}}}
protocols:
  test: {eval: "test:ema", label: test}
  loss: {eval: "test:precise/samples:64/batch:8", measure: loss, label: loss}
  drawn: {eval: "test:precise/samples:10", draws: 3, label: mean}
  drawn_spread: {eval: "test:precise/samples:10", draws: 3, spread: true, label: spread}
  jumps: {eval: "test:ema", over: jumps, label: jumps}
  z: {probe: ema_trace.z, unit: standard deviations, label: z}
  z_max: {probe: ema_trace.z, over: max, unit: standard deviations, label: largest z}
  top: {probe: features.p99, unit: activation, label: p99}
baseline: {column: test}
table: {columns: [test, drawn], epochs: [first, last]}
figure: {kind: bars, x: series, xlabel: "", by: [nbs, epoch], series: [test, drawn]}
published: []
claims:
  lags:
    sentence: z is above 1 early.
    paper: above 1
    kind: direction
    primary: true
    margin: 1
    followup: lags_longer
    contrasts: [[[1, z, {nbs: 2, epoch: first}]]]
facts:
  same:
    sentence: The first draw is the estimate.
    paper: by definition
    tolerance: 1.0e-9
    contrasts: [[[1, drawn, {nbs: 2}], [-1, test, {nbs: 2, epoch: 3}]]]
"""


def load(tmp_path, monkeypatch, raw=None):
    path = tmp_path / "mixed.yaml"
    OmegaConf.save(raw, path) if raw is not None else path.write_text(MIXED)
    monkeypatch.setattr(experiment, "files", lambda: {"mixed": path})
    return experiment.load.__wrapped__("mixed")


def test_what_an_experiment_asks_of_its_runs(tmp_path, monkeypatch):
    """Each draw is an evaluation of its own, and each is asked for once, whatever reads it."""
    mixed = load(tmp_path, monkeypatch)
    drawn = "test:precise/samples:10"
    assert mixed.evals("demo") == [
        "test:ema", "test:precise/batch:8/samples:64", drawn, f"{drawn}/order:1",
        f"{drawn}/order:2",
    ]  # fmt: skip
    assert mixed.probes("demo") == ["ema_trace", "features"]
    monkeypatch.setattr(experiment, "load", lambda _: mixed)
    node = experiment.overlay("mixed", "demo")
    assert (node["evals"], node["probes"]) == (mixed.evals("demo"), mixed.probes("demo"))


def test_without_probes_nothing_is_said_of_them():
    assert "probes" not in experiment.overlay("nbs", "demo")


def test_units(tmp_path, monkeypatch):
    mixed = load(tmp_path, monkeypatch)
    units = {key: (one.unit, one.difference_unit) for key, one in mixed.protocols.items()}
    assert units["drawn_spread"] == ("%", "points")
    assert units["loss"] == ("nats", "nats")
    assert units["z"] == ("standard deviations",) * 2
    assert mixed.claims["lags"].unit == "standard deviations"
    assert mixed.facts["same"].unit == "points"


def test_a_column_may_be_of_some_scales(tmp_path, monkeypatch):
    raw = OmegaConf.create(MIXED)
    raw.scales.desk = raw.scales.demo
    raw.protocols.loss.scales = ["desk"]
    raw.protocols.top.scales = ["desk"]
    mixed = load(tmp_path, monkeypatch, raw)
    assert "test:precise/batch:8/samples:64" in set(mixed.evals("desk")) - set(mixed.evals("demo"))
    assert (mixed.probes("demo"), mixed.probes("desk")) == (
        ["ema_trace"],
        ["ema_trace", "features"],
    )


def test_a_tasks_number_needs_no_probe(tmp_path, monkeypatch):
    raw = OmegaConf.create(MIXED)
    raw.set.task = "features"
    mixed = load(tmp_path, monkeypatch, raw)
    assert mixed.probes("demo") == ["ema_trace"]
    assert mixed.protocols["top"].task
    assert not mixed.protocols["z"].task


def test_an_epoch_of_a_term_is_no_axis(tmp_path, monkeypatch):
    mixed = load(tmp_path, monkeypatch)
    (contrast,) = mixed.facts["same"].contrasts({"nbs": [2, 4]})
    assert contrast.terms == [(1, "drawn", {"nbs": 2}), (-1, "test", {"nbs": 2, "epoch": 3})]
    assert contrast.label == "+drawn(nbs=2) -test(nbs=2, epoch=3)"


@pytest.mark.parametrize(
    ("over", "curve", "number"),
    [
        ("jumps", [5.0, 3.0, 4.0], 1.5),
        ("rise", [5.0, 3.0, 4.0], 1.0),
        ("rise", [5.0, 3.0], 0.0),
        ("max", [5.0, 3.0, 7.0], 7.0),
        ("max", [5.0], 5.0),
        ("mean", [5.0, 3.0, 4.0], 4.0),
        ("jumps", [5.0], math.nan),
        ("rise", [5.0], math.nan),
    ],
)
def test_numbers_over_the_epochs(over, curve, number):
    assert entry.OVER[over](curve) == pytest.approx(number, nan_ok=True)


P, C, F = "protocols", "claims.lags", "facts.same"
BROKEN = [
    ({f"{P}.test.probe": "a.b"}, f"{P}.test: needs either eval or probe"),
    ({f"{P}.test": {"label": "x"}}, f"{P}.test: needs either eval or probe"),
    ({f"{P}.test.measure": "accuracy"}, f"{P}.test.measure: 'accuracy' is none of error, loss"),
    ({f"{P}.loss.unit": "bits"}, f"{P}.loss.unit: loss is in nats, not in bits"),
    ({f"{P}.test.draws": 10}, f"{P}.test: .*option 'order:0' .allowed, once: decay"),
    ({f"{P}.drawn.draws": 1}, f"{P}.drawn.draws: must be one of 2..1000, is 1"),
    ({f"{P}.drawn.draws": "ten"}, f"{P}.drawn.draws: must be one of 2..1000, is 'ten'"),
    ({f"{P}.drawn.eval": "test:precise/order:3"}, f"{P}.drawn.eval: .*leave order out"),
    ({f"{P}.test.spread": True}, f"{P}.test.spread: .* is over draws"),
    ({f"{P}.drawn.spread": "yes"}, f"{P}.drawn.spread: must be true or false"),
    ({f"{P}.jumps.over": "min"}, f"{P}.jumps.over: 'min' is none of jumps, max, mean, rise"),
    ({f"{P}.z.probe": "ema_trace"}, f"{P}.z.probe: 'ema_trace' is not <probe>.<quantity>"),
    (
        {f"{P}.z.draws": 3},
        f"{P}.z: unknown keys .*draws.* .allowed: label, probe, over, scales, unit",
    ),
    ({f"{P}.z.unit": 3}, f"{P}.z.unit: must be text"),
    ({f"{P}.z.scales": ["desk"]}, f"{P}.z.scales: 'desk' is none of demo"),
    ({"baseline.column": "tset"}, "baseline: unknown protocols .*tset"),
    ({"table.epochs": ["early"]}, "table.epochs: epoch must be .* first or last, is 'early'"),
    ({"table": {"columns": ["test"]}}, "figure.by: 'epoch' is an axis of no scale"),
    ({"figure.series": ["test", "z"]}, "figure.series: one axis .*test in %, z in standard"),
    ({"figure.kind": "bands"}, "figure.x: a figure of bands is over epoch, not 'series'"),
    ({"figure.kind": "scatter"}, "figure.x: unknown protocols .*series"),
    ({"figure.kind": "curves"}, "figure.x: 'series' is no axis of scale demo"),
    ({f"{C}.contrasts": [[[1, "z", {"epoch": -1}]]]}, rf"{C}.contrasts\[0\]: epoch must be"),
    (
        {f"{C}.contrasts": [[[1, "z", {"nbs": 2}], [-1, "test", {"nbs": 2}]]]},
        f"{C}: terms of different units .z in standard deviations, test in points",
    ),
    ({f"{C}.followup": 3}, f"{C}.followup: must be text, or texts by scale, is 3"),
    ({f"{C}.followup": {"desk": "x"}}, f"{C}.followup: 'desk' is none of demo"),
    ({f"{C}.followup": {"demo": 3}}, f"{C}.followup.demo: must be text"),
    ({f"{F}.margin": 1}, f"{F}: unknown keys .*margin.* .allowed: .*tolerance"),
    ({f"{F}.tolerance": -1}, f"{F}.tolerance: must not be below 0"),
    ({f"{F}.contrasts": []}, f"{F}.contrasts: has no contrast"),
    ({"differs": ["much"]}, "differs: must be text"),
]


@pytest.mark.parametrize(("change", "says"), BROKEN, ids=[next(iter(c)) for c, _ in BROKEN])
def test_a_malformed_entry_is_refused_by_file_and_key(tmp_path, monkeypatch, change, says):
    raw = OmegaConf.create(MIXED)
    for key, value in change.items():
        OmegaConf.update(raw, key, value, merge=False, force_add=True)
    with pytest.raises(ValueError, match=says) as refused:
        load(tmp_path, monkeypatch, raw)
    assert str(refused.value).startswith("experiments/mixed.yaml, ")
    assert len(str(refused.value).splitlines()) == 1


# -- what was declared stays declared -------------------------------------------------------------


@pytest.mark.parametrize("name", ["gn_batch", "gn_groups", "nbs", "nbs_forms", "norms", "renorm"])
def test_the_recorded_runs_were_made_for_the_claims_as_they_stand(name):
    """Else every claim on them would be exploratory."""
    loaded = experiment.load(name)
    with (RESULTS / name / "runs.csv").open(newline="") as file:
        declared = {row["claims"] for row in csv.DictReader(file) if row["scale"] == "demo"}
    assert declared
    expected = f"{name}:{loaded.claims_digest('demo')}"
    assert all(expected in claims.split() for claims in declared)


@pytest.mark.parametrize(
    ("key", "value", "same"),
    [
        ("claims.lags.followup", "another", True),
        ("claims.lags.followup", {"demo": "another"}, True),
        ("differs", "nothing", True),
        ("facts.same.tolerance", 1.0, False),
        ("claims.lags.margin", 2, False),
        ("protocols.z_max.over", "rise", False),
    ],
)
def test_what_judges_is_declared_and_what_is_said_later_is_not(
    tmp_path, monkeypatch, key, value, same
):
    before = load(tmp_path, monkeypatch).claims_digest("demo")
    raw = OmegaConf.create(MIXED)
    OmegaConf.update(raw, key, value)
    assert (load(tmp_path, monkeypatch, raw).claims_digest("demo") == before) is same
