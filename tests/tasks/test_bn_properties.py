"""The exact properties against formulas, and what is varied in the trainings (4 s)."""

import pytest
import torch
from torch import nn

from normlab.norms.bn import BatchNorm
from normlab.tasks import bn_properties
from normlab.tasks.bn_properties import Design

TINY = ["epochs=1", "data.subset=100", "batch_size=50", "task.width=2", "task.depth=2"]
PLAIN = Design(3, 2, 1.0, "relu", "before", True, 0.0, False)


@pytest.fixture
def images():
    class Images:
        shape, num_classes = (1, 8, 8), 4

    return Images()


def test_scaled_weights_against_the_formula():
    found = bn_properties.scaling(1, factor=3.0, eps=0.01)
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(32, 6, generator=draw, dtype=torch.float64)
    z = x @ (0.1 * torch.randn(5, 6, generator=draw, dtype=torch.float64)).T
    centred, var = z - z.mean(0), z.var(0, correction=0)
    y, large = centred / (var + 0.01).sqrt(), 3 * centred / (9 * var + 0.01).sqrt()
    assert found["scaled_same_eps"] == pytest.approx(float((large - y).abs().max()), abs=1e-12)
    assert found["scaled_same_eps"] > 0.01
    assert found["scaled_same_eps_closed"] == pytest.approx(found["scaled_same_eps"], abs=1e-12)
    assert max(found["scaled"], found["scaled_gradient"]) < 1e-12


def test_a_bias_before_the_norm_is_a_no_op():
    assert max(bn_properties.biased(2).values()) < 1e-12


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        ({}, ["Conv2d", "BatchNorm", "ReLU"]),
        ({"order": "after"}, ["Conv2d", "ReLU", "BatchNorm"]),
        ({"activation": "sigmoid"}, ["Conv2d", "BatchNorm", "Sigmoid"]),
    ],
)
def test_networks_are_what_is_asked_for(images, change, kinds):
    network = bn_properties.build(Design(**{**vars(PLAIN), **change}), True, images)
    assert [type(layer).__name__ for layer in network[:3]] == kinds
    assert (network[0].bias is None) == (change.get("order") != "after")
    assert network(torch.randn(2, 1, 8, 8)).shape == (2, 4)


def test_without_the_norm_there_may_be_another(images):
    plain = bn_properties.build(PLAIN, False, images)
    lrn = bn_properties.build(Design(**{**vars(PLAIN), "lrn": True}), False, images)
    assert not any(isinstance(layer, BatchNorm) for layer in [*plain, *lrn])
    assert [type(layer).__name__ for layer in lrn].count("LocalResponseNorm") == 2
    assert len(lrn) == len(plain) + 2
    small = torch.full((1, 3, 2, 2), 1e-3)
    assert torch.allclose(lrn[2](small), small), "it takes nothing from what is small"
    for wide, narrow in zip(
        bn_properties.build(Design(**{**vars(PLAIN), "init": 100.0}), False, images),
        plain,
        strict=True,
    ):
        if isinstance(wide, nn.Conv2d):
            assert wide.weight.std() > 20 * narrow.weight.std()


def test_the_range_along_the_gradient_of_a_known_loss():
    """Of a linear model the loss is computed again here, with weights of its own."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Dropout(0.0))
    x, y = torch.randn(5, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1])
    before = [p.detach().clone() for p in network.parameters()]
    state = torch.get_rng_state()
    found = bn_properties.along(network, x, y, 0.5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, b) for p, b in zip(network.parameters(), before, strict=True))
    weight, bias = (b.clone().requires_grad_() for b in before)
    loss = nn.functional.cross_entropy(x.flatten(1) @ weight.T + bias, y)
    loss.backward()
    losses = [
        nn.functional.cross_entropy(
            x.flatten(1) @ (weight - s * weight.grad).T + bias - s * bias.grad, y
        )
        for s in (0, 0.25, 0.5, 0.75, 1.0)
    ]
    assert found == pytest.approx(float((max(losses) - min(losses)).detach()), rel=1e-5)


def test_distortions_keep_the_kind_of_image():
    x = torch.randn(50, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = bn_properties.distorted(x, 0.5, torch.Generator().manual_seed(0))
    factor = y.std((1, 2, 3)) / x.std((1, 2, 3))
    offset = (y.mean((1, 2, 3)) - x.mean((1, 2, 3))) / x.std((1, 2, 3))
    assert 0.5 <= factor.min() < 0.7 < 1.3 < factor.max() <= 1.5
    assert -0.5 <= offset.min() < -0.3 < 0.3 < offset.max() <= 0.5
    assert torch.allclose(bn_properties.distorted(x, 0.0, torch.Generator()), x, atol=1e-6)


@pytest.mark.parametrize(("loss", "counts"), [(1.5, 1.5), (float("nan"), 100.0), (1e9, 100.0)])
def test_a_loss_that_is_no_number_counts_as_the_largest(loss, counts):
    assert bn_properties.bounded(loss) == counts


def test_the_same_batches_in_every_epoch_change_the_training(measure):
    new, same = (
        measure("bn_properties", *TINY, "epochs=2", f"task.shuffle={shuffle}")
        for shuffle in ("true", "false")
    )
    assert new["loss_bn"] != same["loss_bn"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("task.width=0", "task.width=0: it must be above 0"),
        ("task.dropout=1.0", r"task.dropout=1.0: it must be in \[0, 1\)"),
        ("task.distort=-1.0", "task.distort=-1.0, task.fall=1.0: neither is below 0"),
        ("task.activation=tanh", "task.activation='tanh': task=bn_properties wants one of relu, "),
    ],
)
def test_refusals(measure, override, says):
    with pytest.raises(ValueError, match=says) as refused:
        measure("bn_properties", *TINY, override)
    assert "\n" not in str(refused.value)
