"""What every probe promises, and each probe's numbers against their definition in numpy."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import whole
from torch import nn
from torch.nn import functional as F

from normlab import probes, worker
from normlab.norms import BatchNorm, GhostBatchNorm
from normlab.norms.base import population_layers
from normlab.probes import ema_memory, ema_trace, feature_evolution

RUNS = [
    ["norm=bn", "nbs=16"],
    ["norm=ghost", "nbs=8", "norm.population=sequential"],
    ["norm=renorm", "nbs=8"],
    ["norm=separate"],
    ["norm=l1", "precision=bf16"],
    ["norm=virtual", "nbs=80"],
    ["norm=gn", "channels_last=true"],
    ["norm=none"],
]


def context_of(*overrides, epochs=1):
    """The context of a run after some epochs of training, in the middle of a generator's stream."""
    job = whole.made(["epochs=2", *overrides], double=False)
    trainer = whole.trainer(job)
    for _ in range(epochs):
        trainer.train_epoch()
    return worker.context(job, epochs)


def state(context):
    """All that a probe has to leave as it was."""
    rng = np.random.get_state()
    return {
        "model": whole.digest(context.model.state_dict()),
        "modes": [module.training for module in context.model.modules()],
        "hooks": [len(module._forward_hooks) for module in context.model.modules()],
        "settings": [
            (layer.own, layer.update, layer.group_size, list(layer.observers))
            for layer in population_layers(context.model).values()
        ],
        "generators": (torch.get_rng_state().tolist(), rng[1].tolist(), rng[2]),
        "gradients": [p.grad is None for p in context.model.parameters()],
    }


@pytest.mark.parametrize("overrides", RUNS, ids=lambda overrides: overrides[0])
@pytest.mark.parametrize("name", probes.names())
def test_a_probe_leaves_everything_as_it_was_and_says_the_same_twice(name, overrides):
    context = context_of(*overrides)
    try:
        probes.beside(name, "check", lambda _: None)(context)
    except ValueError:
        return  # not a probe for this network
    measure, before = probes.find(name), state(context)
    measured = measure(context)
    assert state(context) == before
    assert measure(context) == measured
    assert measured
    assert all(quantity.isidentifier() for quantity in measured)
    assert all(np.isfinite(value) for value in measured.values())


def test_what_is_no_probe_is_not_found():
    with pytest.raises(ValueError, match=r"unknown probe 'base': one of .*ema_trace"):
        probes.find("base")


# -- ema_trace ------------------------------------------------------------------------------------


class Fixed:
    """A data set whose batches are known: batch k of a pass is k + its order, and noise."""

    def __init__(self, size=40):
        self._size = size

    def size(self, _split):
        return self._size

    def images(self, order):
        rng = np.random.default_rng(order)
        return rng.normal(order % 1000 / 50, 1.0, (self._size, 2, 3, 3)).astype(np.float32)

    def eval_batches(self, _split, *, batch_size, order, samples=None, **_how):
        pixels = torch.from_numpy(self.images(order))[:samples]
        whole_ones = len(pixels) // batch_size * batch_size
        return ((x, x[:, 0, 0, 0]) for x in pixels[:whole_ones].split(batch_size))


def test_ema_trace_is_what_its_description_says():
    """Two norms after each other; the second sees what the first has normalized batch by batch."""
    first, second = BatchNorm(2), BatchNorm(2)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([2.0, 3.0]))
        first.bias.copy_(torch.tensor([0.5, -1.0]))
        first.running_mean.copy_(torch.tensor([0.4, -0.3]))
        second.running_mean.copy_(torch.tensor([0.7, 0.1]))
    model = nn.Sequential(first, nn.ReLU(), second)
    context = replace(context_of("norm=bn", "nbs=16", epochs=0), model=model, data=Fixed())
    measured = ema_trace.measure(context)

    # 40 images hold two batches of 16: 100 of them are 50 passes, each in the next order.
    means = []
    for order in range(50):
        images = Fixed().images(context.seed * 1000 + order).astype(np.float64)
        for batch in (images[:16], images[16:32]):
            mean, var = batch.mean((0, 2, 3)), batch.var((0, 2, 3))
            y = (batch - mean[:, None, None]) / np.sqrt(var + 1e-5)[:, None, None]
            y = np.maximum(
                y * np.array([2.0, 3.0])[:, None, None] + np.array([[[0.5]], [[-1.0]]]), 0
            )
            means.append([mean, y.mean((0, 2, 3))])
    means = np.array(means)  # batches, layers, channels
    running = np.array([[0.4, -0.3], [0.7, 0.1]])
    z = np.abs(running - means.mean(0)) / means.std(0, ddof=1)
    median = np.median(z)
    wanted = {"z": median, "log2_z": np.log2(median), "first_ema": 0.4, "last_ema": 0.7}
    assert measured["log2_z_corrected"] == pytest.approx(np.log2(measured["z_corrected"]))
    for place, layer in (("first", 0), ("last", 1)):
        wanted[f"{place}_population"] = means[:, layer, 0].mean()
        for percent in (5, 50, 95):
            at = np.percentile(means[:, layer, 0], percent)
            wanted[f"{place}_batch_p{percent:02}"] = at
    for quantity, value in wanted.items():
        assert measured[quantity] == pytest.approx(value, rel=1e-4, abs=1e-5), quantity


@pytest.mark.parametrize(
    "layer",
    [
        BatchNorm(3, decay=0.8),
        BatchNorm(3, cumulative=True),
        *(GhostBatchNorm(3, nbs=8, decay=0.8, population=rule)
          for rule in ("mean", "pooled", "first", "sequential")),
    ],
    ids=repr,
)  # fmt: skip
def test_a_corrected_average_of_equal_batches_is_their_mean(layer):
    """After three updating forwards on the same groups, whatever the layer's rule is."""
    x = torch.randn(8, 3, 4, 4).repeat(4, 1, 1, 1) + 2
    for _ in range(3):
        layer(x)
    nbs = 8 if isinstance(layer, GhostBatchNorm) else 32
    context = context_of("norm=ghost", f"nbs={nbs}", "batch_size=32", epochs=0)
    corrected = ema_trace._corrected(layer, replace(context, model=layer))
    assert corrected.tolist() == pytest.approx(x.mean((0, 2, 3)).tolist(), rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["norm=gn"], "needs a norm with population statistics that move"),
        (["norm=frozen"], "needs a norm with population statistics that move"),
        (["norm=bn", "data.subset=100", "batch_size=50", "nbs=50"], ""),
    ],
)
def test_who_has_an_average_to_trace(overrides, says):
    context = context_of(*overrides, epochs=0)
    if not says:
        ema_trace.check(context)
        return
    with pytest.raises(ValueError, match=says):
        ema_trace.check(context)


# -- ema_memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["mean", "pooled", "first"])
def test_ema_memory_is_what_a_recursion_by_hand_holds(rule):
    """One number for the initial value, and one for each of the steps."""
    measured = ema_memory.measure(context_of("norm=ghost", "nbs=8", f"norm.population={rule}"))
    for decay, name in ((0.9, "09"), (0.99, "099"), (0.999, "0999")):
        weights = np.array([1.0])
        for _ in range(100):
            weights = np.append(decay * weights, 1 - decay)
        ages = np.arange(99, -1, -1)
        age = weights[1:] @ ages / weights[1:].sum()
        for kind, expected in (("weight", weights[0]), ("age", age)):
            assert measured[f"{kind}_{name}"] == pytest.approx(expected, rel=1e-11), kind
            assert measured[f"{kind}_closed_{name}"] == pytest.approx(expected, rel=1e-11), kind
        assert abs(measured[f"rest_{name}"]) < 1e-11


def test_ema_memory_notices_a_bank_that_is_wrong(monkeypatch):
    """It measures the bank, not the formula: here one of whose averages is a step late."""
    late = BatchNorm.ema_step

    def step(self, mean, var, batch, decay):
        if self.num_batches_tracked > 1:
            late(self, mean, var, batch, decay)

    context = context_of("norm=bn", "nbs=16")
    context.model.apply(lambda m: isinstance(m, BatchNorm) and m.num_batches_tracked.zero_())
    monkeypatch.setattr(BatchNorm, "ema_step", step)
    measured = ema_memory.measure(context)
    assert measured["weight_09"] == pytest.approx(0.9**99)
    assert measured["age_099"] < measured["age_closed_099"] - 0.1


def test_who_has_a_memory_that_the_decay_says():
    for norm, says in (
        (["norm=gn"], "needs a norm with population statistics that move"),
        (["norm=ghost", "nbs=8", "norm.population=sequential"], "sequential keeps more of"),
    ):
        with pytest.raises(ValueError, match=says):
            ema_memory.check(context_of(*norm, epochs=0))


# -- feature_evolution ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 101, 10_000])
def test_percentiles_are_numpys(size):
    values = torch.randn(size)
    found = feature_evolution.percentiles(values, (1, 20, 50, 99, 100))
    assert found == pytest.approx(np.percentile(values.numpy(), (1, 20, 50, 99, 100)), rel=1e-5)


def test_the_features_are_what_the_last_convolution_gives():
    """With group statistics of batch norm in between, and in eval mode: a network by hand."""
    norm = BatchNorm(4)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), norm, nn.Dropout(0.5), nn.Conv2d(4, 3, 1), nn.Flatten(), nn.Linear(3, 2)
    ).train()
    context = replace(context_of("norm=bn", "nbs=16", epochs=0), model=model, data=Fixed())
    measured = feature_evolution.measure(context)

    images = torch.from_numpy(Fixed().images(context.seed * 1000))[:32]  # whole groups of 16
    with torch.no_grad():
        x = F.conv2d(images, model[0].weight, model[0].bias)
        x = torch.cat(
            [F.batch_norm(g, None, None, norm.weight, norm.bias, True) for g in x.split(16)]
        )
        x = F.conv2d(x, model[3].weight, model[3].bias)
    p01, p20, p80, p99 = np.percentile(x.numpy(), (1, 20, 80, 99))
    wanted = {"p01": p01, "p20": p20, "p80": p80, "p99": p99, "range": p99 - p01}
    wanted["log2_range"] = np.log2(p99 - p01)
    assert measured == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_a_network_without_convolutions_has_no_such_features():
    context = replace(context_of("norm=none", epochs=0), model=nn.Linear(2, 2))
    with pytest.raises(ValueError, match="needs a network with convolutions"):
        feature_evolution.check(context)
