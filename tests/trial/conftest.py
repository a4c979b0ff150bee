"""A network of three batch norms and a data set of 96 images, so that a training takes no time."""

import pytest
import torch
from torch import Tensor, nn

from normlab.trial.material import Material
from normlab.trial.networks import Network
from normlab.trial.training import Size, Trained, trained

SIZE = Size(steps=100, further=6, batch=16, train=96, shown=64, test=32)
SEED = 3


class Tiny(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.block = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
        )
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.block(self.norm(self.stem(x)).relu()).mean((2, 3)))
        return y


def images(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """(n, 3, 8, 8) of four classes, which are told from the mean colour."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 4
    colour = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]])[y]
    return torch.randn(n, 3, 8, 8, generator=draw) + colour[:, :, None, None], y


@pytest.fixture(scope="session")
def material() -> Material:
    x, y = images(96, 0)
    return Material("colours", "0" * 16, 4, (x, y), images(32, 1), (0.3 * x + 1, y))


@pytest.fixture(scope="session")
def network() -> Network:
    return Network("tests:tiny", Tiny, ("block",))


@pytest.fixture(scope="session")
def tiny(network: Network, material: Material) -> Trained:
    return trained(network, SEED, SIZE, material)
