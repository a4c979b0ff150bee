"""No normalization: the arm that networks with norms are compared with."""

from torch import Tensor, nn

__all__ = ["NoNorm"]


class NoNorm(nn.Module):
    """No normalization: y = x, the input itself, in train() and eval(), for any shape.

    No parameters, no statistics, no errors; `num_features` is there for the common signature. A
    norm subtracts a convolution's bias again, which is why the models leave biases out: without one
    they need them back (`model.conv_bias=true`).
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        return x

    def extra_repr(self) -> str:
        return str(self.num_features)
