"""`model=resnet18` and `resnet50`: torchvision's ImageNet networks, through `norm_layer`."""

import torchvision.models
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from normlab.models.base import NormConstructor, zero_weight

DEPTHS = (18, 34, 50, 101)


def build(
    norm: NormConstructor,
    *,
    num_classes: int,
    shape: tuple[int, int, int],
    depth: int = 50,
    zero_init_last: bool = False,
) -> nn.Module:
    """torchvision's ResNet of that depth, without biases in the convolutions; He init with fan_out.

    Stride sits in the 3x3 convolution of a bottleneck ("ResNet v1.5"), unlike He et al. (2016).
    zero_init_last  start the last gamma of each residual branch at zero
    Raises ValueError for another depth, images without three channels, and for zero_init_last with
    a norm that has no gamma.
    """
    if depth not in DEPTHS:
        raise ValueError(f"model.depth={depth}: one of {', '.join(map(str, DEPTHS))}")
    if shape[0] != 3:
        raise ValueError(f"model=resnet{depth} takes images of 3 channels, the data has {shape[0]}")
    net: nn.Module = getattr(torchvision.models, f"resnet{depth}")(
        num_classes=num_classes, norm_layer=norm
    )
    if zero_init_last:  # torchvision's own switch skips or crashes on norms without a weight
        for module in net.modules():
            if isinstance(module, BasicBlock):
                zero_weight(module.bn2)
            elif isinstance(module, Bottleneck):
                zero_weight(module.bn3)
    return net
