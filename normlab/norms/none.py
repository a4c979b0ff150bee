"""No normalization: the arm that networks with norms are compared with."""

from torch import Tensor, nn

__all__ = ["NoNorm"]


class NoNorm(nn.Module):
    """No normalization: the input itself, over no axes, in train() and eval().

    y = x. There are no parameters, no mean, no variance and no population. A norm subtracts a
    convolution's bias again, which is why the models leave biases out: without one they need them
    back (`model.conv_bias=true`).

    Args:
        num_features: not used; there for the common signature. The input may have any shape.

    Limits: every norm here where statistics are (0, 1), eps is 0 and weight and bias are 1 and 0.
    Errors: none, in forward neither.

    Source: networks without a norm as in Zhang, Dauphin & Ma 2019, whose initialization (Fixup,
    `init=fixup`) deep ones need to train. Peers: torch.nn.Identity, which takes any
    arguments.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        return x

    def extra_repr(self) -> str:
        return str(self.num_features)
