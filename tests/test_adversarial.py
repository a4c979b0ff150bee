"""Attacks against closed forms of linear networks, and what they leave alone (1 s)."""

import pytest
import torch
from torch import nn

from normlab import norms
from normlab.adversarial import Adversary, pgd
from normlab.domains import Domain
from normlab.norms.base import population_layers

LOW, HIGH = torch.tensor([-1.0]).view(1, 1, 1), torch.tensor([3.0]).view(1, 1, 1)


def linear(classes=2):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, classes)).double()


def images(n=8):
    rng = torch.Generator().manual_seed(1)
    x = torch.rand((n, 1, 4, 4), generator=rng, dtype=torch.float64) * 4 - 1
    return x, torch.arange(n) % 2


def test_of_a_linear_network_with_two_classes_it_is_the_exact_maximum():
    """The loss falls with (w_y - w_other) x alone: every pixel goes to its bound."""
    model, (x, y) = linear(), images()
    eps = torch.full((8, 1, 1, 1), 0.3, dtype=torch.float64)
    made = pgd(model, x, y, eps=eps, low=LOW, high=HIGH)
    weight = model[1].weight.detach()
    away = (weight[1 - y] - weight[y]).view_as(x)
    expected = (x + 0.3 * away.sign()).clamp(-1, 3)
    assert torch.allclose(made, expected)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_it_stays_near_and_within_the_pixels_there_are(steps):
    model, (x, y) = linear(10), images()
    eps = torch.full((8, 1, 1, 1), 0.3, dtype=torch.float64)
    made = pgd(model, x, y, eps=eps, low=LOW, high=HIGH, steps=steps)
    assert (made - x).abs().max() <= 0.3 + 1e-12
    assert made.min() >= -1
    assert made.max() <= 3
    loss = nn.functional.cross_entropy
    assert loss(model(made), y) > loss(model(x), y)


def test_also_where_gradients_are_off():
    model, (x, y) = linear(), images()
    eps = torch.full((8, 1, 1, 1), 0.3, dtype=torch.float64)
    expected = pgd(model, x, y, eps=eps, low=LOW, high=HIGH)
    with torch.inference_mode():
        assert torch.equal(pgd(model, x * 1, y, eps=eps, low=LOW, high=HIGH), expected)


def test_only_images_of_adversarial_domains_change():
    """And no statistics: the batch that the network sees later is the one that counts."""
    torch.manual_seed(0)
    model = nn.Sequential(
        norms.find("bn")(1), nn.Flatten(), nn.Linear(16, 2)
    ).double().train()  # fmt: skip
    x, y = images()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    make = Adversary(model, model, [Domain(), Domain("pgd", 4), Domain("tint", 1)], LOW, HIGH)
    made = make(x, y)
    assert torch.equal(made[::3], x[::3])
    assert torch.equal(made[2::3], x[2::3])
    assert (made[1::3] != x[1::3]).flatten(1).any(1).all()
    assert (made[1::3] - x[1::3]).abs().max() <= 4 / 255 * 4 + 1e-6
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(layer.update is None for layer in population_layers(model).values())


def test_a_layer_that_is_watched_can_be_attacked_and_trained_through():
    """Observers get the statistics of a forward whose gradients are still to be taken."""
    model = nn.Sequential(norms.find("bn")(1), nn.Flatten(), nn.Linear(16, 2)).double().train()
    layer, seen = model[0], []
    layer.observers.append(seen.append)
    x, y = images()
    expected = Adversary(model, model, [Domain("pgd", 4)], LOW, HIGH)(x, y)
    assert len(seen) == 5
    assert torch.allclose(seen[0].var[0], x.var(unbiased=False))
    layer.observers.clear()
    made = Adversary(model, model, [Domain("pgd", 4)], LOW, HIGH)(x, y)
    assert torch.allclose(made, expected)
