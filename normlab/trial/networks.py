"""The networks of the trial: five that get the faults, thirty that are healthy, all at 32x32."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FIVE", "THIRTY", "Network", "norms"]


def norms(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    """The batch norms of a model by name, each once. (1-d ones have the same attributes.)"""
    found = model.named_modules()
    return {name: m for name, m in found if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))}  # type: ignore[misc]


@dataclass(frozen=True)
class Network:
    """A network to be trained for the trial.

    name: `library:architecture`. make: called with the number of classes. blocks: names of the
    modules that a user would recompute to save memory; empty for those that get no faults.
    signals: whether it takes (N, 1, L) and not images.
    """

    name: str
    make: Callable[[int], nn.Module]
    blocks: tuple[str, ...] = ()
    signals: bool = False

    def build(self, classes: int, seed: int) -> nn.Module:
        """A fresh network, whose weights are those of the seed, laid out as trains fastest.

        Its last layer starts near zero, as for a fine-tuning: torchvision's own start of an
        EfficientNet is meant for a thousand classes, and a short training of a few would be lost.
        """
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.make(classes)
            kinds = (nn.Linear, nn.Conv2d)  # DLA ends in a convolution
            *_, head = (m for m in model.modules() if isinstance(m, kinds))
            nn.init.normal_(head.weight, std=0.01)
        return model if self.signals else model.to(memory_format=torch.channels_last)


class ConvNet1d(nn.Module):
    """Six 1-d convolutions with batch norms, for signals (N, 1, L); returns (N, classes)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        plan = [(1, 32, 1), (32, 32, 2), (32, 64, 2), (64, 64, 2), (64, 128, 2), (128, 128, 2)]
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv1d(inside, outside, 5, stride, padding=2, bias=False),
                    nn.BatchNorm1d(outside),
                    nn.ReLU(),
                )
                for inside, outside, stride in plan
            )
        )
        self.head = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.blocks(x).mean(2))
        return y


def _of_torchvision(name: str, **options: Any) -> Callable[[int], nn.Module]:
    def make(classes: int) -> nn.Module:
        import torchvision

        model: nn.Module = torchvision.models.get_model(
            name, weights=None, num_classes=classes, **options
        )
        return model

    return make


def _of_timm(name: str, classes: int) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=classes)
    return model


def _torchvision(name: str, *blocks: str, **options: Any) -> Network:
    return Network(f"torchvision:{name}", _of_torchvision(name, **options), blocks)


def _timm(name: str) -> Network:
    return Network(f"timm:{name}", functools.partial(_of_timm, name))


FIVE = (
    _torchvision("resnet18", "layer1", "layer2", "layer3", "layer4"),
    _torchvision("mobilenet_v3_small", *(f"features.{i}" for i in range(1, 12))),
    _torchvision("densenet121", *(f"features.denseblock{i}" for i in range(1, 5))),
    _torchvision("efficientnet_b0", *(f"features.{i}" for i in range(1, 8))),
    Network("normlab:convnet1d", ConvNet1d, tuple(f"blocks.{i}" for i in range(1, 6)), True),
)
"""What the faults are injected into."""

THIRTY = (
    *FIVE[:4],
    _torchvision("mobilenet_v2"),
    _torchvision("mobilenet_v3_large"),
    _torchvision("shufflenet_v2_x0_5"),
    _torchvision("shufflenet_v2_x1_0"),
    _torchvision("mnasnet0_5"),
    _torchvision("regnet_x_400mf"),
    _torchvision("regnet_y_400mf"),
    _torchvision("googlenet", aux_logits=False, init_weights=False),
    *map(
        _timm,
        (
            "resnet10t", "resnet18d", "resnetv2_18", "seresnet18", "mobilenetv2_035",
            "mobilenetv4_conv_small_050", "lcnet_050", "tinynet_e", "ghostnet_050", "mixnet_s",
            "regnety_002", "repvgg_a0", "rexnet_100", "semnasnet_075", "ese_vovnet19b_dw",
            "cs3darknet_s", "dla46_c", "mobilevit_xxs",
        ),
    ),
)  # fmt: skip
"""What must be found healthy."""
