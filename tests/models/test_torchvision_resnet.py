"""torchvision's residual networks with any norm."""

import pytest
import torch
import torchvision.models
from torch import nn
from torchvision.models.resnet import Bottleneck

from normlab import models

build = models.find("torchvision_resnet")


@pytest.mark.parametrize(("depth", "count"), [(18, 11_689_512), (50, 25_557_032)])
def test_it_is_torchvisions_network(depth: int, count: int) -> None:
    with torch.device("meta"):
        net = build(nn.BatchNorm2d, num_classes=1000, shape=(3, 224, 224), depth=depth)
        theirs = getattr(torchvision.models, f"resnet{depth}")()
    assert sum(p.numel() for p in net.parameters()) == count
    assert list(net.state_dict()) == list(theirs.state_dict())


def test_the_norm_is_the_one_given() -> None:
    net = build(lambda c: nn.GroupNorm(8, c), num_classes=4, shape=(3, 64, 64), depth=18)
    assert not [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert net(torch.randn(2, 3, 64, 64)).shape == (2, 4)


def test_with_zero_init_a_block_starts_as_its_shortcut() -> None:
    net = build(nn.BatchNorm2d, num_classes=4, shape=(3, 32, 32), zero_init_last=True)
    block = net.get_submodule("layer1.1")
    assert isinstance(block, Bottleneck)
    x = torch.randn(2, 256, 4, 4)
    assert torch.equal(block(x), x.relu())
    with pytest.raises(ValueError, match="needs a norm with a weight"):
        build(nn.Identity, num_classes=4, shape=(3, 32, 32), depth=18, zero_init_last=True)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"depth": 20}, "model.depth=20: one of 18, 34, 50, 101"),
        ({"shape": (1, 8, 8)}, "3 channels, the data has 1"),
    ],
)
def test_what_it_cannot_be_is_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(nn.BatchNorm2d, **({"num_classes": 4, "shape": (3, 32, 32)} | wrong))
