"""Fixup initialization (Zhang, Dauphin & Ma 2019): residual networks that train without norms.

What the authors' code does: the first m - 1 of the m convolutions of a residual branch start with
He's deviation times L^(-1/(2m-2)) for L blocks (L^-1/2 for basic blocks, L^-1/4 for bottlenecks;
the exponent +1/(2m-2) that some texts give is wrong), the last one and the classifier at zero; a
scalar bias precedes every convolution and activation of the network, a scalar factor ends every
branch. Biases and factors learn at a tenth of the learning rate.
"""

import torch
from torch import Tensor, nn


class Bias(nn.Module):
    """x + one learnt number, which starts at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


class Scale(nn.Module):
    """x times one learnt number, which starts at 1."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class FixupBlock(nn.Module):
    """The basic block without norms; H and W are divided by `stride`.

    With a = x + bias1a: relu(shortcut + bias2b + scale * conv2(bias2a + relu(bias1b + conv1(a)))),
    where the shortcut is x, or a 1x1 convolution of a where the shape changes.
    """

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.bias1a = Bias()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)
        self.bias1b = Bias()
        self.relu = nn.ReLU(inplace=True)
        self.bias2a = Bias()
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.scale = Scale()
        self.bias2b = Bias()
        self.downsample: nn.Module | None = None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Conv2d(c_in, c_out, 1, stride=stride, bias=False)

    def branch(self, a: Tensor) -> Tensor:
        """What the block adds to its shortcut: zero at the start."""
        y = self.relu(self.bias1b(self.conv1(a)))
        return self.bias2b(self.scale(self.conv2(self.bias2a(y))))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        a = self.bias1a(x)
        shortcut = x if self.downsample is None else self.downsample(a)
        return self.relu(self.branch(a) + shortcut)  # type: ignore[no-any-return]


def branch_factor(blocks: int, layers: int) -> float:
    """Of He's deviation, in the branches of a network of so many blocks of so many convolutions."""
    return float(blocks ** (-1 / (2 * layers - 2)))


@torch.no_grad()
def rescale(model: nn.Module, classifier: nn.Linear) -> None:
    """From He's initialization of `model`'s convolutions to Fixup's."""
    blocks = [module for module in model.modules() if isinstance(module, FixupBlock)]
    for block in blocks:
        block.conv1.weight.mul_(branch_factor(len(blocks), 2))
        block.conv2.weight.zero_()
    classifier.weight.zero_()
    classifier.bias.zero_()
