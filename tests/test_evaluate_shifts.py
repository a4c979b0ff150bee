"""Evaluations of shifted images, with statistics from where they are said to be (4 s)."""

import copy

import numpy as np
import pytest
import torch
import whole
from torch.nn import functional as F

from normlab import adversarial, checkpoint, worker
from normlab.data.base import half, numbers
from normlab.data.corruptions import corrupt
from normlab.domains import Domain
from normlab.norms.base import normalization, population_layers
from normlab.norms.separate import in_turn
from normlab.protocols import Protocol

LOW = Domain.parse("contrast-5")


@pytest.fixture(scope="module")
def job():
    made = whole.made(
        ["norm=ghost", "nbs=8", "batch_size=16", "data.subset=null"], double=False
    )  # fmt: skip
    whole.trainer(made).train_epoch()
    return made


def run(job, spec):
    evaluate, protocol = worker.evaluator(job, checkpoint.Stop()), Protocol.parse(spec)
    evaluate.check(protocol)
    return evaluate.run(protocol)


def halves(job, split, domain):
    """Both halves of a split under a corruption, from the pixels on."""
    (batch,) = job.data.eval_batches(split, batch_size=10_000, order=None)
    x, y = batch
    low, high = job.data.extremes()
    pixels = (255 * (x - low) / (high - low)).round().to(torch.uint8)
    shown = corrupt(pixels, domain, numbers(split, np.arange(len(y))))
    x = shown.float() / 255 * (high - low) + low
    return [(x[half(len(y), which)], y[half(len(y), which)]) for which in (0, 1)]


def score(model, x, y):
    with torch.no_grad():
        logits = model(x)
    return {
        "n": len(y),
        "error": pytest.approx(100 * (logits.argmax(1) != y).double().mean().item()),
        "loss": pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-4),
    }


def numbers_of(row):
    return {key: row[key] for key in ("n", "error", "loss")}


@pytest.mark.parametrize("name", ["none", "contrast-5", "gaussian_noise-3"])
def test_a_shift_shows_the_second_half_corrupted(job, name):
    _, second = halves(job, "val", Domain.parse(name))
    row = run(job, f"val:ema/shift:{name}")
    assert numbers_of(row) == score(copy.deepcopy(job.model).eval(), *second)
    assert row["protocol"] == f"val:ema/shift:{name}"


def test_mini_batches_are_of_shifted_images(job):
    row = run(job, "val:batch/batch:50/shift:contrast-5")
    _, (x, y) = halves(job, "val", LOW)
    assert row["n"] == 150
    assert row["batch"] == 50
    everything = run(job, "val:batch/batch:150/shift:contrast-5")
    model = copy.deepcopy(job.model).eval()
    with normalization(model, statistics="batch", update=False, group_size=150):
        assert numbers_of(everything) == score(model, x, y)


@pytest.mark.parametrize(
    ("spec", "of", "on"),
    [
        ("val:adapted/batch:150/shift:contrast-5", "contrast-5", "contrast-5"),
        ("val:adapted/batch:150/shift:none", "none", "none"),
        ("val:adapted/batch:150/shift:none/stats:contrast-5", "contrast-5", "none"),
        ("val:adapted/batch:150/shift:contrast-5/stats:none", "none", "contrast-5"),
    ],
)
def test_adapted_statistics_are_those_of_the_first_half(job, spec, of, on):
    """In one batch, moments taken layer by layer with hooks."""
    (x, _), _ = halves(job, "val", Domain.parse(of))
    model = copy.deepcopy(job.model).eval()
    seen = {}
    for layer in population_layers(model).values():
        layer.register_forward_hook(lambda m, args, _: seen.update({m: args[0]}))
    with normalization(model, statistics="batch", update=False, group_size=150), torch.no_grad():
        model(x)
    for layer, value in seen.items():
        flat = value.transpose(0, 1).flatten(1)
        layer.running_mean.copy_(flat.mean(1))
        layer.running_var.copy_(flat.var(1, unbiased=False))
    _, second = halves(job, "val", Domain.parse(on))
    row = run(job, spec)
    assert numbers_of(row) == score(model, *second)
    assert (row["samples"], row["batch"]) == (150, 150)


def test_precise_statistics_can_be_of_corrupted_training_images(job):
    rows = [run(job, f"val:precise/shift:contrast-5{s}") for s in ("", "/stats:contrast-5")]
    assert rows[1]["loss"] < rows[0]["loss"]
    assert run(job, "val:precise/stats:none")["loss"] == run(job, "val:precise")["loss"]


def test_labels_of_the_target_are_never_read(job):
    """K6: whatever they are, the statistics stay; and evaluating leaves no trace."""
    before = copy.deepcopy(job.model.state_dict())
    spec = "val:adapted/batch:30/samples:90/shift:contrast-5"
    row = run(job, spec)
    source = job.data._splits["val"]
    first = source.indices[half(len(source.indices), 0)]
    kept = source.labels[first].copy()
    try:
        source.labels[first] = 0
        assert run(job, spec) == row
    finally:
        source.labels[first] = kept
    assert run(job, spec) == row
    assert all(torch.equal(v, before[k]) for k, v in job.model.state_dict().items())


def test_adapting_repairs_what_moves_first_and_second_moments(job):
    source = run(job, "val:ema/shift:contrast-5")["error"]
    target = run(job, "val:adapted/shift:contrast-5")["error"]
    clean = run(job, "val:ema/shift:none")["error"]
    assert target < source - 10
    assert target < clean + 20


def test_norms_without_a_population_have_nothing_to_adapt():
    gn = whole.made(["norm=gn"], double=False)
    rows = [run(gn, f"val:{s}/shift:tint-1") for s in ("ema", "adapted", "batch", "precise")]
    assert len({(row["n"], row["error"], row["loss"]) for row in rows}) == 1
    assert rows[0]["n"] == 150


def test_an_evaluation_can_attack_the_network_that_it_tests(job):
    row = run(job, "val:ema/shift:pgd-8")
    model = copy.deepcopy(job.model).eval()
    _, (x, y) = halves(job, "val", Domain())
    low, high = job.data.extremes()
    eps = (8 / 255 * (high - low)).expand_as(x)
    made = adversarial.pgd(model, x, y, eps=eps, low=low, high=high)
    assert numbers_of(row) == score(model, made, y)
    assert row["loss"] > run(job, "val:ema/shift:none")["loss"]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("val:adapted/shift:none/samples:151", "val has 150 images"),
        ("val:adapted/shift:none/batch:151", "val offers 150"),
        ("val:batch/batch:151/shift:none", "val offers 150"),
    ],
)
def test_halves_are_as_large_as_they_are(job, spec, says):
    with pytest.raises(ValueError, match=says):
        run(job, spec)


def test_a_data_set_that_shows_images_as_stored_is_refused_beforehand(job):
    plain = copy.copy(job)
    plain.data = copy.copy(job.data)
    plain.data.corrupts = False
    run(plain, "val:ema/shift:none")
    with pytest.raises(
        ValueError, match=r"evals: 'val:ema/shift:tint-1': data=digits shows its im"
    ):
        run(plain, "val:ema/shift:tint-1")


# -- networks that know domains -------------------------------------------------------------------

SPECIFIC = [
    "norm=separate", "norm.num_domains=2", "norm.share_affine=false",
    "domains=[contrast-5,none]", "evals=[val:ema]",
]  # fmt: skip


def test_every_domain_is_evaluated_with_its_own_statistics_and_weights():
    job = whole.made(SPECIFIC, double=False)
    whole.trainer(job).train_epoch()
    for number, name in ((0, "contrast-5"), (1, "none")):
        model = copy.deepcopy(job.model).eval()
        for layer in population_layers(model).values():
            for key in ("running_mean", "running_var", "weight", "bias"):
                rows = getattr(layer, key)
                rows.data[1 - number] = rows.data[number]
        _, second = halves(job, "val", Domain.parse(name))
        expected = score(in_turn(model, 2), *second)
        assert numbers_of(run(job, f"val:ema/shift:{name}")) == expected
    with pytest.raises(ValueError, match="no statistics of tint-1, only of contrast-5, none"):
        run(job, "val:ema/shift:tint-1")


def test_precise_statistics_of_several_domains_are_each_ones_own():
    """Of a layer with one population, they are pooled over all domains in turn."""
    job = whole.made([*SPECIFIC, "norm.share_population=true", "norm.share_affine=true"])
    whole.trainer(job).train_epoch()
    shared = run(job, "val:precise/shift:contrast-5")["loss"]
    own = run(job, "val:precise/shift:contrast-5/stats:contrast-5")["loss"]
    assert own < shared
    rows = whole.made(SPECIFIC)
    whole.trainer(rows).train_epoch()
    in_turn = run(rows, "val:precise/batch:64/shift:contrast-5")
    alone = run(rows, "val:precise/batch:32/shift:contrast-5/stats:contrast-5")
    assert in_turn["loss"] == pytest.approx(alone["loss"], rel=0.1)
    with pytest.raises(ValueError, match="a batch must be a multiple of the 2 domains"):
        run(rows, "val:precise/batch:33")


def test_each_is_the_mean_over_the_runs_domains():
    job = whole.made([*SPECIFIC, "norm.share_population=true", "norm.share_affine=true"])
    for each, one in (
        ("val:ema/shift:each", "val:ema/shift:{}"),
        ("val:precise/shift:each/stats:each", "val:precise/shift:{0}/stats:{0}"),
    ):
        row, rows = run(job, each), [run(job, one.format(d)) for d in ("contrast-5", "none")]
        assert row["protocol"] == each
        assert row["n"] == rows[0]["n"] + rows[1]["n"]
        for key in ("error", "loss"):
            assert row[key] == pytest.approx((rows[0][key] + rows[1][key]) / 2)
    with pytest.raises(ValueError, match="val has 150 images"):
        run(job, "val:adapted/samples:200/shift:each")


def test_statistics_of_adversarial_domains_are_refused():
    job = whole.made(["norm=bn", "domains=[none,pgd-4]", "evals=[val:ema]"])
    run(job, "val:ema/shift:pgd-4")
    with pytest.raises(ValueError, match="no precise statistics of images that are made for stat"):
        run(job, "val:precise")


def test_ranks_evaluate_shifts_as_one_process(ranks):
    specs = [
        "val:ema/shift:contrast-5", "val:batch/batch:7/shift:none", "test:ema/shift:pgd-2",
        "val:adapted/batch:8/samples:100/shift:gaussian_noise-5",
        "val:adapted/shift:none/stats:tint-2", "val:precise/shift:jpeg-3/stats:jpeg-3",
    ]  # fmt: skip
    found = ranks.run(_rows, specs, 4, timeout=120)
    assert found[1:] == found[:-1]
    for row, expected in zip(found[0], _rows(0, specs, 1), strict=True):
        assert row == {**expected, "loss": pytest.approx(expected["loss"], rel=1e-9)}


def _rows(_rank, specs, world_size):
    norm = ["norm=bn", "nbs=16"] if world_size > 1 else ["norm=ghost", "nbs=16"]
    job = whole.made([*norm, f"world_size={world_size}"])
    return [run(job, spec) for spec in specs]
