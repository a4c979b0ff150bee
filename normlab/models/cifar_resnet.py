"""`model=resnet8` to `resnet110`: the residual networks for CIFAR of He et al. (2016), section 4.2.

A 3x3 stem, then stages of n basic blocks with `width`, 2*`width`, 4*`width` channels, the first
block of each further stage halving the image; mean over pixels; linear. With three stages the depth
is 6n + 2. Two differences from the paper: where the shape changes, the shortcut is a 1x1
convolution with a norm (its option B, as in torchvision; the paper's CIFAR nets pad with zeros,
option A), and a fourth stage of n blocks with 8*`width` channels can be added, which ends at 4x4
for 32x32 images.
"""

from typing import Literal

from torch import Tensor, nn

from normlab.models import fixup
from normlab.models.base import NormConstructor, initialize, zero_weight

DEPTHS = (8, 20, 32, 56, 110)
STAGES = (3, 4)


class BasicBlock(nn.Module):
    """relu(shortcut(x) + norm(conv(relu(norm(conv(x)))))); H and W are divided by `stride`."""

    def __init__(self, norm: NormConstructor, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = norm(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = norm(c_out)
        self.downsample: nn.Module | None = None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(
                nn.Conv2d(c_in, c_out, 1, stride=stride, bias=False), norm(c_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(y + shortcut)  # type: ignore[no-any-return]


def build(
    norm: NormConstructor,
    *,
    num_classes: int,
    shape: tuple[int, int, int],
    depth: int = 20,
    width: int = 16,
    stages: int = 3,
    zero_init_last: bool = False,
    conv_bias: bool = False,
    init: Literal["default", "fixup"] = "default",
) -> nn.Module:
    """The network; its modules are named as torchvision names those of its ResNets.

    depth           8, 20, 32, 56 or 110: n = (depth - 2) / 6 blocks a stage, whatever `stages` is
    stages          3, or 4 for smaller last feature maps (then 2n layers are added)
    zero_init_last  start the last gamma of each residual branch at zero
    conv_bias       biases in the convolutions: for norm=none, since a norm subtracts them again
    init            fixup: scalar biases and factors in the place of norms, which are not asked for,
                    and the initialization of `normlab.models.fixup`
    Raises ValueError for another depth or number of stages, for zero_init_last with a norm that has
    no gamma, and for either of the two options before with init=fixup, which has its own.
    """
    if depth not in DEPTHS:
        raise ValueError(f"model.depth={depth}: one of {', '.join(map(str, DEPTHS))}")
    if stages not in STAGES:
        raise ValueError(f"model.stages={stages}: one of {', '.join(map(str, STAGES))}")
    if width < 1:
        raise ValueError(f"model.width={width}: it must be at least 1")
    for option, given in (("zero_init_last", zero_init_last), ("conv_bias", conv_bias)):
        if given and init == "fixup":
            raise ValueError(f"model.{option}=true: init=fixup has its own (model.{option}=false)")
    net = nn.Sequential()
    net.add_module("conv1", nn.Conv2d(shape[0], width, 3, padding=1, bias=False))
    if init == "fixup":
        net.add_module("bias1", fixup.Bias())
    else:
        net.add_module("bn1", norm(width))
    net.add_module("relu", nn.ReLU(inplace=True))
    channels = width
    for stage in range(stages):
        out = width * 2**stage
        blocks = nn.Sequential()
        for index in range((depth - 2) // 6):
            stride = 2 if stage > 0 and index == 0 else 1
            if init == "fixup":
                blocks.append(fixup.FixupBlock(channels, out, stride))
            else:
                blocks.append(BasicBlock(norm, channels, out, stride))
            channels = out
        net.add_module(f"layer{stage + 1}", blocks)
    net.add_module("avgpool", nn.AdaptiveAvgPool2d(1))
    net.add_module("flatten", nn.Flatten())
    if init == "fixup":
        net.add_module("bias2", fixup.Bias())
    classifier = nn.Linear(channels, num_classes)
    net.add_module("fc", classifier)
    initialize(net, conv_bias=conv_bias)
    if init == "fixup":
        fixup.rescale(net, classifier)
    if zero_init_last:
        for module in net.modules():
            if isinstance(module, BasicBlock):
                zero_weight(module.bn2)
    return net
