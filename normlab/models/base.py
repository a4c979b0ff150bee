"""What the networks share: the type of a norm constructor, and initialization."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

NormConstructor = Callable[[int], nn.Module]  # number of channels -> layer
M = TypeVar("M", bound=nn.Module)


def initialize(model: M, *, conv_bias: bool = False) -> M:
    """He initialization (2015) of every convolution, fan_out, biases zero; returns `model`.

    Draws from torch's global generator, in the order of `model.modules()`. `conv_bias` gives a bias
    to convolutions made without one: making them with it would draw numbers, and the same seed
    would then give other weights than without biases.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if conv_bias and module.bias is None:
                module.bias = nn.Parameter(module.weight.new_empty(module.out_channels))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def zero_weight(norm: nn.Module) -> None:
    """Set gamma of a residual branch's last norm to zero, so that the block starts as its shortcut
    ("Group Normalization", section 4.1; Goyal et al., 2017).

    Raises ValueError for a layer without a weight: it has no gamma to start at zero.
    """
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor):
        raise ValueError(
            f"model.zero_init_last=true needs a norm with a weight: {type(norm).__name__} has none"
        )
    with torch.no_grad():
        weight.zero_()
