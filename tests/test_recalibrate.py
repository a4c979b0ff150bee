"""`recalibrate`: statistics against the formula in float64, all else bit for bit what it was."""

import copy

import numpy as np
import pytest
import torch
from oracles.moments import of_channels
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

from normlab.norms import BatchNorm, GhostBatchNorm
from normlab.population import estimate
from normlab.recalibrate import recalibrate
from normlab.subject import Scoring, load_batches


def network(norm=nn.BatchNorm2d, dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(),
        nn.Conv2d(4, 5, 3), norm(5), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 10),
    )  # fmt: skip
    return model.to(dtype)


def batches(sizes=(6, 6, 4), dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            (torch.randn(n, 3, 8, 8, generator=generator) * 2 + number).to(dtype),
            torch.randint(0, 10, (n,), generator=generator),
        )
        for number, n in enumerate(sizes)
    ]


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def pooled(model, data):
    """Means and biased variances of the two layers over all elements, each batch by its own."""
    inputs = [model[0](x) for x, _ in data]
    normed = [nn.functional.batch_norm(x, None, None, *model[1].parameters(), True) for x in inputs]
    deeper = [model[3](x.relu()) for x in normed]
    return [of_channels(torch.cat(x).detach().numpy()) for x in (inputs, deeper)]


STATISTICS = ("running_mean", "running_var")


def assert_only_statistics_changed(before, after, layers=("1", "4")):
    changed = {f"{layer}.{what}" for layer in layers for what in STATISTICS}
    assert list(before) == list(after)
    for name, value in before.items():
        assert torch.equal(value, after[name]) == (name not in changed), name


@pytest.mark.parametrize("training", [True, False])
def test_the_statistics_become_the_pooled_ones_and_nothing_else_changes(training):
    """torch's update_bn would give the means of the batches' unbiased variances."""
    model, data = network(dtype=torch.float64).train(training), batches(dtype=torch.float64)
    before = snapshot(model)
    report = recalibrate(model, data)
    assert_only_statistics_changed(before, snapshot(model))
    assert all(module.training == training for module in model.modules())
    assert all(type(module).__module__.startswith("torch.") for module in model.modules())
    for name, (mean, var) in zip(("1", "4"), pooled(model, data), strict=True):
        np.testing.assert_allclose(model[int(name)].running_mean, mean, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(model[int(name)].running_var, var, rtol=1e-10)
        assert torch.equal(report.state[f"{name}.running_var"], model[int(name)].running_var)
    assert (report.samples, report.batch, report.same_data) == (16, 6, True)


def test_means_over_equal_batches_are_those_of_torchs_update_bn():
    model, data = network(dtype=torch.float64), batches((6, 6, 6), torch.float64)
    theirs = copy.deepcopy(model)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    torch.optim.swa_utils.update_bn(data, theirs)
    recalibrate(model, data, estimator="mean")
    for layer in (1, 4):
        for what in STATISTICS:
            mine, other = getattr(model[layer], what), getattr(theirs[layer], what)
            torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


def test_layer_by_layer_is_what_one_batch_of_all_gives():
    data = batches(dtype=torch.float64)
    model = network(dtype=torch.float64)
    report = recalibrate(model, data, estimator="layerwise")
    [whole] = [tuple(torch.cat(parts) for parts in zip(*data, strict=True))]
    for layer, (mean, var) in zip((1, 4), pooled(model, [whole]), strict=True):
        np.testing.assert_allclose(model[layer].running_mean, mean, rtol=1e-9, atol=1e-10)
        np.testing.assert_allclose(model[layer].running_var, var, rtol=1e-9)
    assert report.samples == 16


def test_nbs_is_how_many_samples_share_statistics():
    data = batches((6, 6), torch.float64)
    model, other = network(dtype=torch.float64), network(dtype=torch.float64)
    recalibrate(model, data, nbs=3)
    parts = [(x, y) for both in data for x, y in zip(*(v.split(3) for v in both), strict=True)]
    recalibrate(other, parts)
    assert torch.allclose(model[4].running_var, other[4].running_var, rtol=1e-12)
    assert not torch.allclose(model[4].running_var, recalibrated(data)[4].running_var, rtol=1e-4)


def recalibrated(data):
    model = network(dtype=torch.float64)
    recalibrate(model, data)
    return model


def test_the_report_is_of_the_model_before_and_after():
    model, data = network(), batches()
    other = [(x + 1, y) for x, y in data]

    def by_torch():
        with torch.no_grad():
            outputs = torch.cat([model.eval()(x) for x, _ in other])
        labels = torch.cat([y for _, y in other])
        wrong = outputs.argmax(1).ne(labels).double().mean().item()
        return 100 * wrong, nn.functional.cross_entropy(outputs.double(), labels).item()

    before = by_torch()
    report = recalibrate(model, data, test=other)
    for score, (error, loss) in ((report.before, before), (report.after, by_torch())):
        assert score.n == 16
        assert score.error == pytest.approx(error)
        assert score.loss == pytest.approx(loss, rel=1e-6)
    assert report.before != report.after
    told = str(report)
    assert "2 batch norms: statistics of 16 samples, pooled, in batches of 6" in told
    assert f"{report.after.loss:.4f}\non 16 samples of test data" in told


def test_without_labels_only_the_statistics_are_told():
    told = str(recalibrate(network(), [x for x, _ in batches()]))
    assert told.splitlines()[1] == "loss and error are not known: the data has no labels"


class Frozen(nn.Module):
    """One of each kind, in a row."""

    def __init__(self):
        super().__init__()
        self.frozen = FrozenBatchNorm2d(3)
        self.untracked = nn.BatchNorm2d(3, track_running_stats=False)
        self.still = nn.BatchNorm2d(3, momentum=0.0)
        self.sync = nn.SyncBatchNorm(3)
        self.own = GhostBatchNorm(3, nbs=2)
        self.own_frozen = BatchNorm(3, statistics="population")
        self.group = nn.GroupNorm(3, 3)
        self.instance = nn.InstanceNorm2d(3, track_running_stats=True)
        self.unused = nn.BatchNorm2d(3)
        self.again = self.still

    def forward(self, x):
        for name, module in self.named_children():
            x = x if name == "unused" else module(x)
        return self.again(x).mean((2, 3))


def test_which_layers_are_estimated_and_which_stay():
    model = Frozen()
    before = snapshot(model)
    report = recalibrate(model, [x for x, _ in batches()])
    layers = ("still", "again", "sync", "own")
    assert_only_statistics_changed(before, snapshot(model), layers)
    assert list(report.population) == ["still", "sync", "own"]
    assert report.untouched == {
        "frozen": "frozen",
        "untracked": "it has no running statistics",
        "own_frozen": "frozen",
        "unused": "no batch reached it",
    }
    assert "left as they were: frozen (frozen) and 3 more" in str(report)
    assert torch.equal(model.again.running_var, model.still.running_var)


def test_timms_norms_with_an_activation():
    timm = pytest.importorskip("timm")
    model = timm.create_model("mobilenetv3_small_050", num_classes=10)
    before = snapshot(model)
    data = [(torch.randn(4, 3, 32, 32), torch.zeros(4).long()) for _ in range(2)]
    report = recalibrate(model, data)
    names = [n for n in before if n.endswith(("running_mean", "running_var"))]
    assert len(report.population) * 2 == len(names) > 60
    for name, value in snapshot(model).items():
        assert torch.equal(value, before[name]) == (name not in names), name
    first = model.conv_stem(torch.cat([x for x, _ in data]))
    torch.testing.assert_close(model.bn1.running_var, first.var((0, 2, 3), correction=0))


class Special(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class Evo(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x):
        return x / self.running_var.view(1, -1, 1, 1).sqrt()


@pytest.mark.parametrize("kind", [Special, Evo])
def test_unknown_layers_are_refused_by_name_or_kept(kind):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), kind(4), nn.AvgPool2d(6))
    model.append(nn.Flatten())
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"2 is a .*{kind.__name__}, .*unknown='keep' leaves"):
        recalibrate(model, batches())
    assert all(torch.equal(value, before[name]) for name, value in snapshot(model).items())
    report = recalibrate(model, [x for x, _ in batches()], unknown="keep")
    assert_only_statistics_changed(before, snapshot(model), ["1"])
    assert report.untouched == {"2": f"a {kind.__name__}"}


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        (nn.Conv2d(3, 4, 3), {}, "Conv2d has no batch norm .*: there is none"),
        (nn.GroupNorm(3, 3), {}, "GroupNorm has no batch norm .*: there is none"),
        (FrozenBatchNorm2d(3), {}, "could be estimated: all 1 are frozen"),
        (network(), {"estimator": "cheap"}, "estimator is one of pooled, mean, layerwise"),
        (network(), {"unknown": "drop"}, "unknown is 'refuse' or 'keep'"),
        (network(), {"batches": iter(batches())}, "give a list or a loader"),
        (network(), {"nbs": 4}, "a batch of 6 samples is not a multiple of group_size=4"),
        (network(), {"batches": [torch.full((4, 3, 8, 8), torch.nan)]},
         "the statistics of '1' are not finite"),
    ],
)  # fmt: skip
def test_what_cannot_be_estimated_is_refused_and_nothing_changes(model, options, said):
    before = snapshot(model)
    given = {"batches": [x for x, _ in batches()], **options}
    with pytest.raises(ValueError, match=said):
        recalibrate(model, given.pop("batches"), **given)
    assert all(torch.equal(value, before[name]) for name, value in snapshot(model).items())


def on_ranks(rank, file):
    """Rank 3 has no batch."""
    data = load_batches(str(file), batch_size=8).of_rank(rank, 4)
    found = {}
    for estimator in ("pooled", "mean", "layerwise"):
        model = network(dtype=torch.float64)
        report = recalibrate(model, Doubled(data), estimator=estimator, nbs=4)
        found[estimator] = report.population, snapshot(model), report.before, report.after
        assert (report.samples, report.batch) == (24, 8)
    return found


class Doubled:
    """In float64: what is compared is the sum over ranks."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return ((x.double(), y) for x, y in self.data)


def test_ranks_get_what_one_process_would(ranks, tmp_path):
    generator = np.random.default_rng(0)
    x, y = generator.standard_normal((24, 3, 8, 8)), generator.integers(0, 10, 24)
    np.savez(tmp_path / "a.npz", x=x, y=y)
    whole = Doubled(load_batches(str(tmp_path / "a.npz"), batch_size=8))
    of_ranks = ranks.run(on_ranks, tmp_path / "a.npz")
    for estimator in ("pooled", "mean", "layerwise"):
        model = network(dtype=torch.float64)
        expected = recalibrate(model, whole, estimator=estimator, nbs=4)
        for population, state, before, after in (one[estimator] for one in of_ranks):
            for name, value in snapshot(model).items():
                assert torch.equal(state[name], of_ranks[0][estimator][1][name])
                torch.testing.assert_close(state[name], value, rtol=1e-12, atol=1e-12)
            assert population["4"].count == expected.population["4"].count
            for mine, theirs in ((before, expected.before), (after, expected.after)):
                assert (mine.n, mine.error_sum) == (theirs.n, theirs.error_sum)
                assert mine.loss_sum == pytest.approx(theirs.loss_sum, rel=1e-12)


def test_a_forward_of_ones_own():
    model, data = network(), [{"picture": x, "class": y} for x, y in batches()]
    scoring = Scoring(
        forward=lambda model, batch: model(batch["picture"]),
        loss=lambda outputs, batch: nn.functional.cross_entropy(outputs, batch["class"]),
    )
    report = recalibrate(model, data, scoring=scoring)
    other = network()
    expected = recalibrate(other, batches())
    assert torch.equal(model[4].running_var, other[4].running_var)
    assert report.after.loss == pytest.approx(expected.after.loss, rel=1e-5)
    assert report.samples == 16


def test_the_population_is_that_of_the_library():
    model, own = network(), network(BatchNorm)
    own.load_state_dict(model.state_dict())
    expected = estimate(own, batches(), estimator="pooled")
    found = recalibrate(model, batches()).population
    for name, values in expected.items():
        torch.testing.assert_close(found[name].var, values.var, rtol=1e-12, atol=0)
