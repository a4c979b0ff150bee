"""Virtual batch norm in a network, whose layers all see the forward-only samples."""

import copy

import pytest
import torch
from oracles.virtual import two_streams as normalized
from torch import nn
from torch.utils.checkpoint import checkpoint

from normlab.norms import BatchNorm, VirtualBatchNorm, forward_only, forward_with, normalization

from .test_virtual import same, state


def network(**options):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), VirtualBatchNorm(4, **options), nn.ReLU(),
        nn.Sequential(nn.Conv2d(4, 5, 3), VirtualBatchNorm(5, **options), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3),
    ).double()  # fmt: skip


def images(samples, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 2, 9, 9, generator=generator, dtype=torch.float64)


def two_streams(model, x, v):
    """The network run on x and, apart and without gradients, on v: each layer by hand."""
    layers = [*model[:3], *model[3], *model[4:]]
    for layer in layers:
        if not isinstance(layer, VirtualBatchNorm):
            x, v = layer(x), layer(v).detach()
            continue
        x, v = normalized(x, v, layer.weight, layer.bias, layer.eps)
        v = v.detach()
    return x


def gradients(model, y):
    model.zero_grad()
    y.square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


class TestThroughANetwork:
    def test_own_gradient_is_that_of_two_streams(self):
        """Extra images that run forward only: constants in every layer, down to the first."""
        model, x, v = network(), images(4), images(6, seed=2)
        expected = two_streams(model, x, v)
        wanted = gradients(model, expected)
        y = forward_with(model, x, v)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
        for mine, theirs in zip(gradients(model, y), wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)

    def test_all_gradient_is_that_of_batch_norm_on_the_whole_batch(self):
        model, x, v = network(gradient="all"), images(4), images(6, seed=2)
        plain = copy.deepcopy(model)
        plain[1], plain[3][1] = BatchNorm(4).double(), BatchNorm(5).double()
        y, expected = forward_with(model, x, v), plain(torch.cat([x, v]))[:4]
        assert torch.equal(y, expected)
        wanted = gradients(plain, expected)
        assert all(map(torch.equal, gradients(model, y), wanted))
        other = network(gradient="own")
        mine = gradients(other, forward_with(other, x, v))
        assert not torch.allclose(mine[0], wanted[0], rtol=1e-3)  # the option matters

    @pytest.mark.parametrize("gradient", ["own", "all"])
    def test_a_reference_makes_samples_independent_to_the_bit(self, gradient):
        """N5: y_i depends on no other x_j, in any layer, and neither does its gradient."""
        model, reference = network(reference=1, gradient=gradient), images(6, seed=2)
        x = images(4).requires_grad_()
        y = forward_with(model, x, reference)
        (dx,) = torch.autograd.grad(y[1].sum(), x)
        assert not dx[[0, 2, 3]].any()
        changed = x.detach().clone()
        changed[[0, 2, 3]] = images(3, seed=9) * 100 + 7
        assert torch.equal(forward_with(model, changed, reference)[1], y[1])
        model.eval()
        with normalization(model, statistics="batch"):
            alone = forward_with(model, x[1:2], reference)
        torch.testing.assert_close(alone[0], y[1], rtol=0, atol=1e-12)
        with normalization(model, statistics="batch"):
            other = forward_with(model, x, images(6, seed=5))
        assert not torch.allclose(other, y, rtol=1e-3)

    def test_population_statistics_do_not_look_at_the_others(self):
        """P47: testing takes any batch, with forward-only samples or without."""
        model, x = network(extra=3).eval(), images(2)
        torch.testing.assert_close(model(x), forward_with(model, x, images(6, seed=2)))
        assert model(x[:1]).shape == (1, 3)

    def test_checkpointing_updates_once(self):
        """P18: the recomputation in backward moves the buffers no second time."""
        model = network(population="own")
        twin = copy.deepcopy(model)
        z = torch.cat([images(4), images(6, seed=2)])
        with forward_only(model, 6), forward_only(twin, 6):
            y = model(z)[:4]
            wanted = gradients(model, y)
            again = checkpoint(twin, z.requires_grad_(), use_reentrant=False)[:4]
            found = gradients(twin, again)
        assert all(map(torch.equal, found, wanted))
        assert same(state(model), state(twin))


class TestContext:
    def test_nests_and_restores_after_exceptions(self):
        model = network(extra=1)
        layers = [m for m in model.modules() if isinstance(m, VirtualBatchNorm)]
        with forward_only(model, 4):
            assert [layer.virtual for layer in layers] == [4, 4]
            with pytest.raises(KeyError), forward_only(model, 2):
                raise KeyError(layers[0].virtual)
            assert [layer.virtual for layer in layers] == [4, 4]
            assert copy.deepcopy(layers[0]).virtual == 1
        assert [layer.virtual for layer in layers] == [1, 1]

    @pytest.mark.parametrize("samples", [-1, 2.0, True, None])
    def test_refuses_other_numbers(self, samples):
        with (
            pytest.raises(ValueError, match="samples must be a whole number from 0 on"),
            forward_only(network(), samples),
        ):
            pass

    def test_refuses_a_model_to_which_they_are_ordinary_samples(self):
        model = nn.Sequential(BatchNorm(2))
        with pytest.raises(ValueError, match="need a model with a VirtualBatchNorm"):
            forward_with(model, images(4), images(2))
        assert not model[0].num_batches_tracked
