"""`model=vgg16`: configuration D of Simonyan & Zisserman (2015), a norm after each convolution."""

import torch
from torch import Tensor, nn
from torchvision.models.vgg import cfgs

from normlab.models.base import NormConstructor, initialize


class VGG(nn.Module):
    """`features`, `avgpool` and `classifier` as in torchvision's VGG: the same state_dict keys with
    `conv_bias`."""

    def __init__(
        self, features: nn.Module, channels: int, pooled: int, hidden: int | None, num_classes: int
    ) -> None:
        super().__init__()
        self.features = features
        self.avgpool = nn.AdaptiveAvgPool2d(pooled)
        flat = channels * pooled * pooled
        if hidden is None:
            self.classifier = nn.Sequential(nn.Linear(flat, num_classes))
            return
        self.classifier = nn.Sequential(
            nn.Linear(flat, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        return self.classifier(torch.flatten(x, 1))  # type: ignore[no-any-return]


def build(
    norm: NormConstructor,
    *,
    num_classes: int,
    shape: tuple[int, int, int],
    channels: int = 64,
    stages: int = 5,
    hidden: int | None = 4096,
    conv_bias: bool = False,
) -> nn.Module:
    """torchvision's `vgg16_bn` with another norm, for images of at least 2^stages pixels a side.

    channels   of the first of its five stages; the others have 2, 4, 8 and 8 times as many
    stages     how many of them the network has, each ending in a pooling that halves the image:
               2, 4, 7, 10 or 13 convolutions
    hidden     width of the two hidden linear layers (4096 for ImageNet; 512 is plenty for CIFAR);
               None: there are none, and no dropout: narrow ones do not train, as their weights
               begin with torchvision's standard deviation of 0.01 whatever their width
    conv_bias  biases in the convolutions: torchvision's has them, but a norm subtracts them again;
               set it with norm=none
    The last feature map is pooled to at most 7x7, torchvision's size, but never enlarged: one 32x32
    image ends as 1x1. Dropout draws from torch's global generator while training.
    Raises ValueError for smaller images.
    """
    taken, height, width = shape
    if not 1 <= stages <= 5:
        raise ValueError(f"model.stages={stages}: it must be from 1 to 5")
    if channels < 1:
        raise ValueError(f"model.channels={channels}: it must be at least 1")
    shrink = 2**stages
    if min(height, width) < shrink:
        raise ValueError(
            f"model=vgg16 takes images of at least {shrink}x{shrink}, not {height}x{width}"
        )
    if hidden is not None and hidden < 1:
        raise ValueError(f"model.hidden={hidden}: it must be at least 1")
    layers: list[nn.Module] = []
    poolings = 0
    for entry in cfgs["D"]:
        if entry == "M":
            layers.append(nn.MaxPool2d(2))
            poolings += 1
            if poolings == stages:
                break
            continue
        out = int(entry) * channels // 64
        layers += [nn.Conv2d(taken, out, 3, padding=1, bias=False), norm(out)]
        layers.append(nn.ReLU(inplace=True))
        taken = out
    pooled = min(7, min(height, width) // shrink)
    net = VGG(nn.Sequential(*layers), taken, pooled, hidden, num_classes)
    initialize(net, conv_bias=conv_bias)
    for module in net.classifier:
        if isinstance(module, nn.Linear):  # as in torchvision
            nn.init.normal_(module.weight, 0, 0.01)
            nn.init.zeros_(module.bias)
    return net
