"""`model=vgg16`: configuration D of Simonyan & Zisserman (2015), a norm after each convolution."""

import torch
from torch import Tensor, nn
from torchvision.models.vgg import cfgs

from normlab.models.base import NormConstructor, initialize

SHRINK = 32  # five poolings


class VGG(nn.Module):
    """`features`, `avgpool` and `classifier` as in torchvision's VGG: the same state_dict keys with
    `conv_bias`."""

    def __init__(self, features: nn.Module, pooled: int, hidden: int, num_classes: int) -> None:
        super().__init__()
        self.features = features
        self.avgpool = nn.AdaptiveAvgPool2d(pooled)
        self.classifier = nn.Sequential(
            nn.Linear(512 * pooled * pooled, hidden),
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
    hidden: int = 4096,
    conv_bias: bool = False,
) -> nn.Module:
    """torchvision's `vgg16_bn` with another norm, for images of at least 32x32.

    hidden     width of the two hidden linear layers (4096 for ImageNet; 512 is plenty for CIFAR)
    conv_bias  biases in the convolutions: torchvision's has them, but a norm subtracts them again;
               set it with norm=none
    The last feature map is pooled to at most 7x7, torchvision's size, but never enlarged: one 32x32
    image ends as 1x1. Dropout draws from torch's global generator while training.
    Raises ValueError for smaller images.
    """
    channels, height, width = shape
    if min(height, width) < SHRINK:
        raise ValueError(
            f"model=vgg16 takes images of at least {SHRINK}x{SHRINK}, not {height}x{width}"
        )
    if hidden < 1:
        raise ValueError(f"model.hidden={hidden}: it must be at least 1")
    layers: list[nn.Module] = []
    for entry in cfgs["D"]:
        if entry == "M":
            layers.append(nn.MaxPool2d(2))
            continue
        out = int(entry)
        layers += [nn.Conv2d(channels, out, 3, padding=1, bias=False), norm(out)]
        layers.append(nn.ReLU(inplace=True))
        channels = out
    pooled = min(7, min(height, width) // SHRINK)
    net = initialize(VGG(nn.Sequential(*layers), pooled, hidden, num_classes), conv_bias=conv_bias)
    for module in net.classifier:
        if isinstance(module, nn.Linear):  # as in torchvision
            nn.init.normal_(module.weight, 0, 0.01)
            nn.init.zeros_(module.bias)
    return net
