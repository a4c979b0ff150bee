"""VGG-16 with any norm."""

import pytest
import torch
import torchvision.models
from torch import nn

from normlab import models

build = models.find("vgg16")


def test_with_biases_it_is_torchvisions_vgg16_bn() -> None:
    with torch.device("meta"):
        net = build(nn.BatchNorm2d, num_classes=1000, shape=(3, 224, 224), conv_bias=True)
        theirs = torchvision.models.vgg16_bn()
    ours = {k: v.shape for k, v in net.state_dict().items()}
    assert ours == {k: v.shape for k, v in theirs.state_dict().items()}
    assert sum(p.numel() for p in net.parameters()) == 138_365_992


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda c: nn.GroupNorm(32, c), nn.Identity])
def test_it_takes_cifar(norm: type[nn.Module]) -> None:
    net = build(norm, num_classes=10, shape=(3, 32, 32), hidden=16)
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert [m.bias for m in net.modules() if isinstance(m, nn.Conv2d)] == [None] * 13


def test_narrow_and_short_it_takes_digits() -> None:
    widths: list[int] = []

    def norm(channels: int) -> nn.Module:
        widths.append(channels)
        return nn.Identity()

    net = build(norm, num_classes=10, shape=(1, 8, 8), channels=16, stages=3, hidden=32)
    assert widths == [16, 16, 32, 32, 64, 64, 64]
    assert net.features(torch.randn(2, 1, 8, 8)).shape == (2, 64, 1, 1)
    assert net(torch.randn(2, 1, 8, 8)).shape == (2, 10)
    short = build(norm, num_classes=10, shape=(1, 8, 8), channels=16, stages=3, hidden=None)
    assert [type(layer) for layer in short.classifier] == [nn.Linear]
    assert short(torch.randn(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"shape": (1, 8, 8)}, "at least 32x32, not 8x8"),
        ({"hidden": 0}, r"model\.hidden=0"),
        ({"channels": 0}, r"model\.channels=0"),
        ({"stages": 6}, r"model\.stages=6"),
        ({"stages": 4, "shape": (3, 15, 15)}, "at least 16x16, not 15x15"),
    ],
)
def test_what_it_cannot_be_is_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(nn.BatchNorm2d, **({"num_classes": 10, "shape": (3, 32, 32)} | wrong))
