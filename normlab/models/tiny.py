"""`model=tiny`: three conv-norm-relu blocks, 15,000 parameters, seconds to train on digits."""

from torch import nn

from normlab.models.base import NormConstructor, initialize


def build(
    norm: NormConstructor,
    *,
    num_classes: int,
    shape: tuple[int, int, int],
    width: int = 16,
    conv_bias: bool = False,
) -> nn.Module:
    """3x3 convolutions of `width`, 2*`width` (stride 2), 2*`width` channels; pixel mean; linear.

    shape      (C, H, W) of an image; any H, W >= 1
    conv_bias  biases in the convolutions: for norm=none, since a norm subtracts them again
    """
    if width < 1:
        raise ValueError(f"model.width={width}: it must be at least 1")
    layers: list[nn.Module] = []
    channels = shape[0]
    for out, stride in ((width, 1), (2 * width, 2), (2 * width, 1)):
        layers += [
            nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False),
            norm(out),
            nn.ReLU(inplace=True),
        ]
        channels = out
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)]
    return initialize(nn.Sequential(*layers), conv_bias=conv_bias)
