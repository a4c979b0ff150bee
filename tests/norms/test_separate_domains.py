"""Whose samples a separate batch norm is told they are: labels, their context, their refusals."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from normlab.norms import BatchNorm, domains

from .test_separate import LABELS, SWITCHES, same, separate, state


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
