"""Separate batch norm against float64 formulas, and against one batch norm per domain."""

import copy
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from normlab.norms import BatchNorm, SeparateBatchNorm, domains, normalization
from normlab.population import EmaBank, estimate, using

from .formulas import LAYOUTS, SHAPES, lay_out, random_affine, sets_per_channel, statistics

LABELS = [2, 0, 2, 2, 0, 2, 0, 2]  # of 8 samples; domain 1 is absent
SWITCHES = list(product([False, True], repeat=3))  # statistics, population, affine: shared?


def separate(channels, number=3, switches=(False, False, True), **options):
    names = ("share_statistics", "share_population", "share_affine")
    return SeparateBatchNorm(
        channels, num_domains=number, **dict(zip(names, switches, strict=True)), **options
    )


def state(layer):
    return copy.deepcopy(layer.state_dict())


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


def numpy(tensor):
    return tensor.detach().double().numpy().copy()


def unbiased(part):
    """Mean and unbiased variance per channel of samples (N, C, ...)."""
    flat = np.moveaxis(part, 1, 0).reshape(part.shape[1], -1)
    return flat.mean(1), flat.var(1, ddof=1)


def expected_buffers(layer, x, labels, shared_statistics, shared_population):
    """The buffers after one updating forward, by the definition of each combination."""
    mean, var, a = numpy(layer.running_mean), numpy(layer.running_var), 1 - layer.decay
    present = sorted(set(labels))
    if shared_population:
        parts = [x] if shared_statistics else [x[np.array(labels) == d] for d in present]
        for part in parts:  # one population takes one step after another
            m, u = unbiased(part)
            mean, var = (1 - a) * mean + a * m, (1 - a) * var + a * u
        return mean, var, len(parts)
    steps = np.zeros(len(mean), dtype=int)
    for d in present:
        m, u = unbiased(x[np.array(labels) == d])
        mean[d], var[d], steps[d] = (1 - a) * mean[d] + a * m, (1 - a) * var[d] + a * u, 1
    return mean, var, steps


def per_domain(parameter, number):
    values = numpy(parameter)
    return values if values.ndim == 2 else np.tile(values, (number, 1))


def check_combination(layer, switches, shape, dtype, layout, labels=LABELS):
    """y, dx, dweight, dbias and buffers in train(), y and dx in eval(), from the definitions."""
    generator = torch.Generator().manual_seed(3)
    labels = labels[: shape[0]]
    shift = torch.tensor(labels, dtype=torch.float64).reshape(-1, *[1] * (len(shape) - 1))
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * (1 + shift) + 3 * shift
    dy = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    layer = layer.double() if dtype == torch.float64 else layer
    random_affine(layer)
    x = lay_out(x.to(dtype), layout).requires_grad_()
    values, gradient = numpy(x), numpy(dy)
    wide = (slice(None), slice(None), *[None] * (len(shape) - 2))
    others = tuple(range(2, len(shape)))
    weight, bias = (per_domain(p, 3)[labels][wide] for p in (layer.weight, layer.bias))
    sets = sets_per_channel(shape, [0] * len(labels) if switches[0] else labels)
    _, sets = np.unique(sets, return_inverse=True)
    sets = sets.reshape(shape)
    mean, var = statistics(values, sets)
    rstd = 1 / np.sqrt(var + layer.eps)
    h = (values - mean[sets]) * rstd[sets]
    g = gradient * weight
    dx = rstd[sets] * (g - statistics(g, sets)[0][sets] - h * statistics(g * h, sets)[0][sets])
    dweight, dbias = np.zeros((3, shape[1])), np.zeros((3, shape[1]))
    np.add.at(dweight, labels, (gradient * h).sum(others))
    np.add.at(dbias, labels, gradient.sum(others))
    if switches[2]:
        dweight, dbias = dweight.sum(0), dbias.sum(0)
    buffers = expected_buffers(layer, values, labels, *switches[:2])

    with domains(layer, labels):
        y = layer(x)
    y.backward(lay_out(dy, layout))
    assert y.dtype == dtype
    if layout == "channels_last" and len(shape) > 3:
        assert y.movedim(1, -1).is_contiguous()
    atol = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2}[dtype]

    def close(actual, wanted):
        actual, scale = numpy(actual), max(1.0, np.abs(wanted).max())
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=atol * scale)

    close(y, h * weight + bias)
    close(x.grad, dx)
    close(layer.weight.grad, dweight)
    close(layer.bias.grad, dbias)
    close(layer.running_mean, buffers[0])
    close(layer.running_var, buffers[1])
    assert layer.num_batches_tracked.tolist() == np.asarray(buffers[2]).tolist()

    layer.eval()
    x.grad = None
    with domains(layer, labels):
        y = layer(x)
    y.backward(dy)
    mean, var = (per_domain(b, 3)[labels][wide] for b in (layer.running_mean, layer.running_var))
    scale = weight / np.sqrt(var + layer.eps)
    close(y, (values - mean) * scale + bias)
    close(x.grad, gradient * scale)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("switches", SWITCHES)
def test_every_combination_of_the_switches(switches, dtype, layout):
    """P58: each of the 8 combinations of table 5 is what its definition says."""
    check_combination(separate(6, switches=switches), switches, (8, 6, 4, 3), dtype, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("switches", [(False, False, False), (True, False, False)])
def test_shapes_and_layouts(switches, shape, layout):
    check_combination(separate(6, switches=switches), switches, shape, torch.float64, layout)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("own_affine", [False, True])
def test_is_one_batch_norm_per_domain_to_the_bit(own_affine, layout, dtype):
    """P56, P57: a mixed batch is each domain's own batch norm: outputs, gradients and buffers."""
    torch.manual_seed(0)
    layer = separate(5, switches=(False, False, not own_affine))
    random_affine(layer)
    if dtype == torch.float64:
        layer.double()
    each = [BatchNorm(5).to(layer.weight.dtype) for _ in range(3)]
    for d, norm in enumerate(each):
        weight, bias = layer._affine(d)
        norm.load_state_dict({**norm.state_dict(), "weight": weight, "bias": bias})
    for labels in (LABELS, [0, 0, 0, 1, 1, 2, 2, 2], [1] * 8):
        indices = torch.tensor(labels)
        x = lay_out(torch.randn(8, 5, 4, 4).to(dtype), layout).requires_grad_()
        dy = lay_out(torch.randn(8, 5, 4, 4).to(dtype), layout)
        layer.zero_grad()
        with domains(layer, labels):
            y = layer(x)
        y.backward(dy)
        for d in range(3):
            each[d].zero_grad()
            mine = indices == d
            if not mine.any():
                continue
            z = lay_out(x.detach()[mine], layout).requires_grad_()
            expected = each[d](z)
            expected.backward(lay_out(dy[mine], layout))
            assert torch.equal(y[mine], expected)
            assert torch.equal(x.grad[mine], z.grad)
            assert torch.equal(layer.running_mean[d], each[d].running_mean)
            assert torch.equal(layer.running_var[d], each[d].running_var)
            if own_affine:
                assert torch.equal(layer.weight.grad[d], each[d].weight.grad)
                assert torch.equal(layer.bias.grad[d], each[d].bias.grad)
        if not own_affine:
            total = sum(norm.weight.grad for norm in each if norm.weight.grad is not None)
            torch.testing.assert_close(layer.weight.grad, total)
        assert layer.num_batches_tracked.tolist() == [int(v.num_batches_tracked) for v in each]
    layer.eval()
    x = lay_out(torch.randn(8, 5, 4, 4).to(dtype), layout)
    with domains(layer, LABELS):
        y = layer(x)
    for d in (0, 2):
        mine = torch.tensor(LABELS) == d
        assert torch.equal(y[mine], each[d].eval()(lay_out(x[mine], layout)))


def test_shared_population_is_one_batch_norm_called_on_each_domain():
    """P58: specific statistics, one buffer moved by each domain in turn, as heads share BN."""
    torch.manual_seed(0)
    layer, once = separate(5, switches=(False, True, True)), BatchNorm(5)
    x = torch.randn(8, 5, 3, 3)
    with domains(layer, LABELS):
        y = layer(x)
    for d in (0, 2):
        mine = torch.tensor(LABELS) == d
        assert torch.equal(once(x[mine]), y[mine])
    assert same(state(layer), state(once))


@pytest.mark.parametrize("switches", SWITCHES)
def test_one_domain_is_batch_norm(switches):
    torch.manual_seed(0)
    layer, plain = separate(5, 1, switches), BatchNorm(5)
    assert layer.load_state_dict(plain.state_dict())
    x = torch.randn(8, 5, 3, 3, requires_grad=True)
    z = x.detach().clone().requires_grad_()
    for labels in (None, 0, [0] * 8):
        if labels is None:
            y = layer(x)
        else:
            with domains(layer, labels):
                y = layer(x)
        expected = plain(z)
        assert torch.equal(y, expected)
        y.sum().backward()
        expected.sum().backward()
        assert torch.equal(x.grad, z.grad)
    assert same(state(layer), state(plain))
    assert plain.load_state_dict(layer.state_dict())


def test_all_shared_is_batch_norm_and_needs_no_labels():
    torch.manual_seed(0)
    layer, plain = separate(5, 3, (True, True, True)), BatchNorm(5)
    x = torch.randn(8, 5, 3, 3)
    assert torch.equal(layer(x), plain(x))
    with domains(layer, LABELS):
        assert torch.equal(layer(x), plain(x))
    assert same(state(layer), state(plain))
    assert torch.equal(layer.eval()(x), plain.eval()(x))


@settings(max_examples=40, deadline=None)
@given(
    labels=st.lists(st.integers(0, 3), min_size=2, max_size=9),
    switches=st.sampled_from(SWITCHES),
    layout=st.sampled_from(LAYOUTS),
    training=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_permuting_the_batch_permutes_the_output(labels, switches, layout, training, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (len(labels), 3, 2, 2)
    x = lay_out(torch.randn(shape, generator=generator, dtype=torch.float64), layout)
    order = torch.randperm(len(labels), generator=generator)
    one = separate(3, 4, switches).double().train(training)
    random_affine(one)
    two = copy.deepcopy(one)
    labels = torch.tensor(labels)
    with domains(one, labels), domains(two, labels[order]):
        torch.testing.assert_close(one(x)[order], two(x[order]), rtol=0, atol=1e-11)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, two.state_dict()[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("switches", [s for s in SWITCHES if not s[1]])
def test_an_absent_domain_keeps_its_buffers(switches):
    layer = separate(3, 3, switches)
    with torch.no_grad():
        layer.running_mean.uniform_()
        layer.running_var.uniform_()
    before = state(layer)
    with domains(layer, LABELS):
        layer(torch.randn(8, 3, 2, 2)).sum().backward()
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        now = getattr(layer, name)
        assert torch.equal(now[1], before[name][1])
        assert not torch.equal(now[0], before[name][0])
    if not switches[2]:
        assert not layer.weight.grad[1].any()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 2, 3], "domain 3 of sample 3: the domains of the layer are 0 to 2"),
        ([0, -1, 2, 1], "domain -1 of sample 1: the domains of the layer are 0 to 2"),
        (3, "domain 3: the domains of the layer are 0 to 2"),
        (-1, "domain -1: the domains"),
        ([0.0, 1.0, 0.0, 1.0], r"whole numbers.* not torch.float32 of shape \(4,\)"),
        (torch.zeros(4, dtype=torch.bool), "whole numbers.* not torch.bool"),
        (True, "whole numbers.* not torch.bool"),
        (torch.zeros(2, 2, dtype=torch.long), r"not torch.int64 of shape \(2, 2\)"),
    ],
)
def test_invalid_labels_are_refused(labels, message):
    layer = separate(3)
    with pytest.raises(ValueError, match=message) as caught, domains(layer, labels):
        pass
    assert "\n" not in str(caught.value)
    assert layer.domains is None


@pytest.mark.parametrize("switches", [s for s in SWITCHES if s != (True, True, True)])
@pytest.mark.parametrize("training", [True, False])
def test_a_wrong_number_of_labels_is_refused(switches, training):
    layer = separate(3, 3, switches).train(training)
    used = not (training and switches[0] and switches[2] and switches[1])
    used = used and not (not training and switches[1] and switches[2])
    before, x = state(layer), torch.randn(8, 3, 2)
    unlabelled = None if used else copy.deepcopy(layer)(x)
    with domains(layer, [0, 1, 2]):
        if used:
            with pytest.raises(ValueError, match="8 samples came with 3 domain labels"):
                layer(x)
            assert same(state(layer), before)
        else:  # what uses nothing specific does not look at labels
            assert torch.equal(layer(x), unlabelled)


@pytest.mark.parametrize("training", [True, False])
def test_unknown_domains_are_refused(training):
    """P57: nothing is normalized by a guess of whose it is."""
    layer = separate(3).train(training)
    before = state(layer)
    with pytest.raises(ValueError, match=r"does not know which of its 3 domains .*with domains"):
        layer(torch.randn(4, 3, 2))
    assert same(state(layer), before)


def test_population_that_all_share_needs_no_labels_at_test():
    layer = separate(3, switches=(False, True, True))
    x = torch.randn(8, 3, 2)
    with domains(layer, LABELS):
        layer(x)
    plain = BatchNorm(3)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("switches", [s for s in SWITCHES if not (s[0] and s[1])])
def test_one_element_of_a_domain_is_refused(switches):
    """P6: a domain with one sample and one position has no variance."""
    layer = separate(3, 3, switches)
    before = state(layer)
    with domains(layer, [0, 0, 1, 0]):
        with pytest.raises(ValueError, match="per domain and channel: domain 1 has 1 samples"):
            layer(torch.randn(4, 3))
        assert same(state(layer), before)
        layer(torch.randn(4, 3, 2))  # two positions are enough


def test_an_empty_batch():
    layer = separate(3)
    with domains(layer, []):
        with pytest.raises(ValueError, match="empty batch"):
            layer(torch.randn(0, 3, 2))
        assert layer.eval()(torch.randn(0, 3, 2)).shape == (0, 3, 2)


def network():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), separate(3, 2), nn.ReLU(), nn.Sequential(nn.Conv2d(3, 4, 3)),
        separate(4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), BatchNorm(4),
    )  # fmt: skip


class TestContext:
    def test_reaches_deep_layers(self):
        torch.manual_seed(0)
        model = network()
        labels = torch.tensor([0, 1, 1, 0], dtype=torch.int32)
        with domains(model, labels):
            model(torch.randn(4, 2, 8, 8)).sum().backward()
        assert model[1].num_batches_tracked.tolist() == [1, 1]
        assert model[4].num_batches_tracked.tolist() == [1, 1, 0]
        assert model[1].domains is None

    def test_nests_and_restores_after_exceptions(self):
        layer, x = separate(3).eval(), torch.randn(2, 3)
        with torch.no_grad():
            layer.running_mean.copy_(torch.arange(3.0)[:, None])
        with domains(layer, 0):
            first = layer(x)
            with domains(layer, [1, 2]):
                assert torch.allclose(layer(x), first - torch.tensor([[1.0], [2.0]]), atol=1e-4)
            assert torch.equal(layer(x), first)
            with pytest.raises(KeyError), domains(layer, 2):
                raise KeyError
            assert torch.equal(layer(x), first)
        assert layer.domains is None

    def test_one_domain_for_a_batch_of_any_size(self):
        torch.manual_seed(0)
        layer, plain = separate(3), BatchNorm(3)
        for samples in (4, 7):
            x = torch.randn(samples, 3, 2)
            with domains(layer, 2 if samples == 4 else torch.tensor(2)):
                assert torch.equal(layer(x), plain(x))
        assert layer.num_batches_tracked.tolist() == [0, 0, 2]

    def test_refuses_before_any_change(self):
        model = network()
        with domains(model, 0):
            before = model[1].domains
            message = "domain 2 of sample 1: the domains of 1 are 0 to 1"
            with pytest.raises(ValueError, match=message), domains(model, [0, 2]):
                pass
            assert model[1].domains is model[4].domains is before

    def test_labels_may_change_afterwards(self):
        layer, labels = separate(3), torch.tensor([0, 0, 1, 1])
        with domains(layer, labels):
            labels.fill_(2)
            layer(torch.randn(4, 3))
        assert layer.num_batches_tracked.tolist() == [1, 1, 0]

    def test_copies_know_no_labels(self):
        layer = separate(3)
        with domains(layer, LABELS):
            twin = copy.deepcopy(layer)
        assert twin.domains is None
        x = torch.randn(8, 3, 2)
        with domains(layer, LABELS), domains(twin, LABELS):
            assert torch.equal(layer(x), twin(x))
        assert same(state(layer), state(twin))

    def test_a_model_without_such_layers_is_left_alone(self):
        with domains(nn.Linear(2, 2), [0, 1]):
            pass


def test_a_layer_called_twice_before_backward():
    """P28, P62: real and fake as domains of one batch norm, in two calls or in one."""
    torch.manual_seed(0)
    layer = separate(3, 2)
    twin = copy.deepcopy(layer)
    real, fake = torch.randn(4, 3, 2), torch.randn(4, 3, 2) + 5
    with domains(layer, 0):
        a = layer(real)
    with domains(layer, 1):
        b = layer(fake)
    (a.square().sum() + b.sum()).backward()
    with domains(twin, [0] * 4 + [1] * 4):
        y = twin(torch.cat([real, fake]))
    assert torch.equal(y, torch.cat([a, b]))
    (y[:4].square().sum() + y[4:].sum()).backward()
    torch.testing.assert_close(layer.weight.grad, twin.weight.grad)
    assert same(state(layer), state(twin))


def test_checkpointing_updates_once():
    """P18: the recomputation in backward moves no domain's buffers again."""
    torch.manual_seed(0)
    layer = separate(3)
    twin = copy.deepcopy(layer)
    x = torch.randn(8, 3, 2, requires_grad=True)
    z = x.detach().clone().requires_grad_()
    with domains(layer, LABELS), domains(twin, LABELS):
        layer(x).square().sum().backward()
        checkpoint(twin, z, use_reentrant=False).square().sum().backward()
    assert torch.equal(x.grad, z.grad)
    assert same(state(layer), state(twin))


class TestStateDict:
    @pytest.mark.parametrize("switches", SWITCHES)
    def test_a_batch_norm_fills_every_domain(self, switches):
        """P15: any batch norm's checkpoint loads, strictly."""
        torch.manual_seed(0)
        plain = nn.BatchNorm2d(3)
        random_affine(plain)
        plain(torch.randn(8, 3, 2, 2))
        layer, stored = separate(3, 2, switches), plain.state_dict()
        before = copy.deepcopy(stored)
        layer.load_state_dict(stored, strict=True)
        assert all(torch.equal(stored[k], before[k]) for k in before)
        x = torch.randn(4, 3, 2, 2)
        with domains(layer.eval(), [0, 1, 1, 0]):
            torch.testing.assert_close(layer(x), plain.eval()(x))
        with torch.no_grad():  # no two domains share memory
            layer.running_mean.view(-1)[0] += 1
        assert (layer.running_mean.view(-1)[1:] == before["running_mean"].repeat(2)[1:6][
            : layer.running_mean.numel() - 1]).all()  # fmt: skip

    @pytest.mark.parametrize("switches", SWITCHES)
    def test_round_trip(self, switches):
        layer, other = separate(3, 3, switches), separate(3, 3, switches)
        with domains(layer, LABELS):
            layer(torch.randn(8, 3, 2))
        other.load_state_dict(layer.state_dict(), strict=True)
        assert same(state(layer), state(other))

    def test_shared_ones_have_torch_s_layout(self):
        shapes = {k: v.shape for k, v in nn.BatchNorm2d(3).state_dict().items()}
        layer = separate(3, 2, (False, True, True))
        assert {k: v.shape for k, v in layer.state_dict().items()} == shapes
        specific = {
            k: v.shape for k, v in separate(3, 2, (True, False, False)).state_dict().items()
        }
        assert specific == {name: (2, *shape) for name, shape in shapes.items()}

    def test_domains_do_not_load_into_one(self):
        with pytest.raises(RuntimeError, match="running_mean"):
            BatchNorm(3).load_state_dict(separate(3).state_dict())
        with pytest.raises(RuntimeError, match="running_mean"):
            separate(3, 2).load_state_dict(separate(3, 3).state_dict())


class TestPopulation:
    def batches(self):
        generator = torch.Generator().manual_seed(1)
        for labels in ([0, 0, 2, 2], [2, 0, 2, 0], [2, 2, 2, 2]):
            labels = torch.tensor(labels)
            noise = torch.randn(4, 3, 5, generator=generator, dtype=torch.float64)
            yield noise * 2 + labels[:, None, None] * 7, labels

    @staticmethod
    def forward(model, batch):
        with domains(model, batch[1]):
            return model(batch[0])

    @pytest.mark.parametrize("shared_statistics", [False, True])
    def test_estimate_is_per_domain(self, shared_statistics):
        """P57: each domain's population is that of its samples; an unseen domain has none."""
        model = nn.Sequential(separate(3, 3, (shared_statistics, False, True)).double())
        before = state(model)
        found = estimate(model, self.batches(), estimator="pooled", forward=self.forward)
        assert found.keys() == {"0[0]", "0[2]"}
        x, labels = (torch.cat(parts) for parts in zip(*self.batches(), strict=True))
        for d in (0, 2):
            mine = x[labels == d]
            assert found[f"0[{d}]"].count == mine.numel() // 3
            torch.testing.assert_close(found[f"0[{d}]"].mean, mine.mean((0, 2)))
            torch.testing.assert_close(found[f"0[{d}]"].var, mine.var((0, 2), correction=0))
        assert same(state(model), before)
        with using(model, found):
            assert torch.equal(model[0].running_var[2], found["0[2]"].var)
            assert torch.equal(model[0].running_mean[1], before["0.running_mean"][1])
        assert same(state(model), before)

    def test_estimate_of_a_shared_population_pools_the_domains(self):
        model = nn.Sequential(separate(3, 3, (False, True, True)).double())
        found = estimate(model, self.batches(), estimator="pooled", forward=self.forward)
        x = torch.cat([batch for batch, _ in self.batches()])
        assert found.keys() == {"0"}
        torch.testing.assert_close(found["0"].mean, x.mean((0, 2)))
        torch.testing.assert_close(found["0"].var, x.var((0, 2), correction=0))

    def test_layerwise_is_refused(self):
        model = nn.Sequential(separate(3, 3))
        with pytest.raises(ValueError, match=r"layerwise: .*0.* has several populations"):
            estimate(model, list(self.batches()), estimator="layerwise", forward=self.forward)

    @pytest.mark.parametrize("switches", [s for s in SWITCHES if s[2]])
    def test_a_bank_with_the_layer_s_decay_follows_its_buffers(self, switches):
        model = nn.Sequential(separate(3, 3, switches).double())
        bank = EmaBank(model, [0.9, 0.5])
        for batch in self.batches():
            self.forward(model, batch)
        found = bank.population(0.9)
        named = {f"0{key}": row for key, row in model[0].populations().items()}
        assert found.keys() == ({"0"} if switches[1] else {"0[0]", "0[2]"})
        for name, values in found.items():
            torch.testing.assert_close(values.mean, named[name][0])
            torch.testing.assert_close(values.var, named[name][1])
        other = EmaBank(model, [0.9, 0.5])
        other.load_state_dict(bank.state_dict())
        assert torch.equal(other.population(0.5)[name].mean, bank.population(0.5)[name].mean)


class TestChoices:
    @pytest.mark.parametrize("switches", SWITCHES)
    @pytest.mark.parametrize("update", [None, False, True])
    @pytest.mark.parametrize("source", [None, "batch", "population"])
    @pytest.mark.parametrize("training", [True, False])
    def test_the_four_choices(self, switches, update, source, training):
        """P50: every legal combination runs a step, the illegal one is refused by name."""
        layer = separate(3, 3, switches).train(training)
        layer.statistics, layer.update = source, update
        uses_batch = source == "batch" or (source is None and training)
        before = state(layer)
        x = torch.randn(8, 3, 2)
        with domains(layer, LABELS):
            if update and not uses_batch:
                with pytest.raises(ValueError, match="update=True needs statistics='batch'"):
                    layer(x)
                assert same(state(layer), before)
                return
            layer(x).sum().backward()
        moved = uses_batch and (training if update is None else update)
        assert same(state(layer), before) != moved

    def test_group_size_is_of_the_batch_and_each_domain_in_it(self):
        torch.manual_seed(0)
        layer = separate(3).double()
        x = torch.randn(8, 3, 4, dtype=torch.float64)
        with domains(layer, LABELS), normalization(layer, group_size=4, update=False):
            y = layer(x)
        for rows in ([0, 2, 3], [1], [4, 6], [5, 7]):
            expected = BatchNorm(3).double()(x[rows])
            torch.testing.assert_close(y[rows], expected)
        layer.group_size = 3
        with pytest.raises(ValueError, match="group_size=3"), domains(layer, LABELS):
            layer(x)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("switches", SWITCHES)
def test_large_means_keep_precision(switches, layout):
    """P64: a mean of 1e4 and a spread of 1 in float32, for outputs and every population."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 3, 8, 8, generator=generator, dtype=torch.float64) + 1e4
    x = lay_out(x.float(), layout)
    layer, exact = separate(3, 3, switches, decay=0.5), separate(3, 3, switches, decay=0.5).double()
    with domains(layer, LABELS), domains(exact, LABELS):
        torch.testing.assert_close(layer(x).double(), exact(x.double()), rtol=0, atol=1e-2)
    torch.testing.assert_close(layer.running_var.double(), exact.running_var, rtol=1e-2, atol=0)


@pytest.mark.parametrize("switches", SWITCHES)
def test_half_precision_keeps_float32_statistics(switches):
    """P65: float16 inputs of size 300 do not overflow, and the buffers stay float32."""
    x = (torch.randn(8, 3, 6, 6) + 300).half()
    layer, exact = separate(3, 3, switches), separate(3, 3, switches).double()
    with domains(layer, LABELS), domains(exact, LABELS):
        y = layer(x)
        expected = exact(x.double())
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-2)
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32
    torch.testing.assert_close(layer.running_var.double(), exact.running_var, rtol=1e-3, atol=0)


@pytest.mark.parametrize("switches", SWITCHES)
def test_a_layer_in_half_precision_runs(switches):
    """Parameters and buffers in half too: forward, backward, update and evaluation."""
    layer = separate(3, 3, switches).bfloat16()
    exact = copy.deepcopy(layer).double()
    x = torch.randn(8, 3, 6, 6).bfloat16().requires_grad_()
    with domains(layer, LABELS), domains(exact, LABELS):
        for training in (True, False):
            y, expected = layer.train(training)(x), exact.train(training)(x.detach().double())
            assert y.dtype == torch.bfloat16
            torch.testing.assert_close(y.double(), expected, rtol=0.05, atol=0.05)
            y.square().sum().backward()
            assert x.grad.isfinite().all()
    assert all(v.dtype in (torch.bfloat16, torch.int64) for v in layer.state_dict().values())


@pytest.mark.parametrize("update", [True, False])
def test_observers_get_what_a_batch_norm_s_would(update):
    """To the bit, by the route that updates and the one that does not; variances below eps."""
    torch.manual_seed(0)
    layer, plain, x = separate(3), BatchNorm(3), torch.randn(8, 3, 4, 4) * 1e-4
    seen = {}
    for norm in (layer, plain):
        norm.update, seen[norm] = update, []
        norm.observers.append(seen[norm].append)
    with domains(layer, LABELS):
        layer(x)
    for d in (0, 2):
        plain(x[torch.tensor(LABELS) == d])
    assert [batch.population for batch in seen[layer]] == ["[0]", "[2]"]
    for one, other in zip(seen[layer], seen[plain], strict=True):
        assert torch.equal(one.mean, other.mean)
        assert torch.equal(one.var, other.var)
        assert one.count == other.count


@pytest.mark.parametrize("switches", SWITCHES)
def test_gradcheck(switches):
    torch.manual_seed(0)
    layer = separate(2, 3, switches).double()
    x = torch.randn(8, 2, 3, dtype=torch.float64, requires_grad=True)
    with domains(layer, LABELS):
        assert torch.autograd.gradcheck(layer, x)


@pytest.mark.parametrize("switches", [(False, False, False), (True, False, False)])
def test_compiles_into_one_graph(switches):
    """P73: sorted by domain and back without a graph break, equal to eager."""
    torch.manual_seed(0)
    layer = separate(3, 3, switches)
    twin, x = copy.deepcopy(layer), torch.randn(8, 3, 4)
    torch._dynamo.reset()  # its limit of recompilations is one for all layers of a process
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    with domains(layer, LABELS), domains(twin, LABELS):
        torch.testing.assert_close(compiled(x), layer(x))
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[name], value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_domains": 0}, "num_domains must be a whole number from 1 on, not 0"),
        ({"num_domains": 2.0}, "num_domains must be a whole number"),
        ({"num_domains": True}, "num_domains must be a whole number"),
        ({"num_domains": 2, "share_affine": False, "affine": False}, "share_affine=False needs"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SeparateBatchNorm(3, **options)


def test_no_affine():
    layer = separate(3, 2, affine=False)
    with domains(layer, [0, 0, 1, 1]):
        y = layer(torch.randn(4, 3, 5))
    torch.testing.assert_close(y[:2].mean((0, 2)), torch.zeros(3), rtol=0, atol=1e-6)
    assert layer.weight is layer.bias is None


def test_repr_says_what_is_shared():
    assert "num_domains=3, share_statistics=False, share_population=True" in repr(
        separate(3, 3, (False, True, True))
    )
