"""No normalization: the arm that networks with norms are compared with."""

from torch import Tensor, nn

__all__ = ["NoNorm"]


class NoNorm(nn.Module):
    """The identity, to the bit; no parameters. `num_features` is there for the common signature."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        return x

    def extra_repr(self) -> str:
        return str(self.num_features)
