"""The smallest network."""

import pytest
import torch
from torch import nn

from normlab import models

build = models.find("tiny")


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 5, 7), (1, 1, 1)])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda c: nn.GroupNorm(4, c), nn.Identity])
def test_it_takes_any_image(shape: tuple[int, int, int], norm: type[nn.Module]) -> None:
    net = build(norm, num_classes=7, shape=shape)
    assert net(torch.randn(4, *shape)).shape == (4, 7)


def test_it_is_small_and_its_convolutions_have_no_bias_unless_asked() -> None:
    net = build(nn.BatchNorm2d, num_classes=10, shape=(3, 32, 32))
    assert sum(p.numel() for p in net.parameters()) == 14_746
    biased = build(nn.Identity, num_classes=10, shape=(3, 32, 32), conv_bias=True)
    for model, expected in ((net, False), (biased, True)):
        convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
        assert [m.bias is not None for m in convolutions] == [expected] * 3


def test_it_learns_without_a_norm() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = build(nn.Identity, num_classes=2, shape=(1, 8, 8), conv_bias=True)
        y = torch.arange(64) % 2
        x = torch.randn(64, 1, 8, 8) + 2.0 * y.view(-1, 1, 1, 1) - 1
        sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        for _ in range(60):
            sgd.zero_grad()
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            sgd.step()
    assert loss.item() < 0.3  # chance is 0.69


def test_an_impossible_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.width=0"):
        build(nn.BatchNorm2d, num_classes=2, shape=(1, 8, 8), width=0)
