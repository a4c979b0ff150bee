"""Networks are found by name, and share their initialization."""

import math

import pytest
import torch
from torch import nn

from normlab import models
from normlab.models.base import initialize, zero_weight


def test_networks_are_found_by_name() -> None:
    assert models.names() == ["cifar_resnet", "tiny", "torchvision_resnet", "vgg16"]
    assert all(callable(models.find(name)) for name in models.names())
    with pytest.raises(ValueError, match="unknown model 'base': one of cifar_resnet, "):
        models.find("base")


def test_convolutions_start_with_he_fan_out() -> None:
    conv = nn.Conv2d(8, 128, 3)  # fan_in 72, fan_out 1152
    initialize(conv)
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / 1152), rel=0.03)
    assert conv.bias is not None
    assert not conv.bias.any()


def test_only_a_weight_can_start_at_zero() -> None:
    norm = nn.BatchNorm2d(3)
    zero_weight(norm)
    assert not norm.weight.any()
    assert norm.weight.requires_grad
    for without in (nn.Identity(), nn.BatchNorm2d(3, affine=False)):
        with pytest.raises(ValueError, match=f"zero_init_last=true .*{type(without).__name__}"):
            zero_weight(without)


SMALL: dict[str, dict[str, int]] = {
    "torchvision_resnet": {"depth": 18},
    "vgg16": {"hidden": 8},
    "cifar_resnet": {"depth": 8},
}


@pytest.mark.parametrize("name", ["cifar_resnet", "tiny", "vgg16"])
def test_biases_of_convolutions_change_no_weight_of_a_seed(name: str) -> None:
    """An arm without a norm starts from the weights of the arms that it is compared with."""

    def weights(**options: bool) -> list[torch.Tensor]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = models.find(name)(
                nn.Identity, num_classes=3, shape=(3, 32, 32), **SMALL.get(name, {}), **options
            )
        return [p.detach() for key, p in net.named_parameters() if key.endswith("weight")]

    for plain, biased in zip(weights(), weights(conv_bias=True), strict=True):
        assert torch.equal(plain, biased)


@pytest.mark.parametrize("name", models.names())
def test_the_seed_of_torch_decides_the_weights(name: str) -> None:
    def build(seed: int) -> torch.Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            net = models.find(name)(
                nn.BatchNorm2d, num_classes=3, shape=(3, 32, 32), **SMALL.get(name, {})
            )
        return nn.utils.parameters_to_vector(net.parameters()).detach()

    assert torch.equal(build(1), build(1))
    assert not torch.equal(build(1), build(2))
