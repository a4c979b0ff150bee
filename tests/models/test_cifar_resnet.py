"""The residual networks for CIFAR."""

import pytest
import torch
from torch import nn

from normlab import models
from normlab.models.cifar_resnet import DEPTHS, BasicBlock

build = models.find("cifar_resnet")


def network(**options: object) -> nn.Module:
    arguments = {"num_classes": 10, "shape": (3, 32, 32)} | options
    with torch.device("meta"):
        return build(nn.BatchNorm2d, **arguments)


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(("depth", "count"), [(20, 0.27), (32, 0.46), (56, 0.85), (110, 1.7)])
def test_sizes_are_those_of_the_paper(depth: int, count: float) -> None:
    # He et al. (2016), Table 6, in millions, with parameter-free shortcuts: ours add 2,752.
    assert (parameters(network(depth=depth)) - 2752) / 1e6 == pytest.approx(count, rel=0.02)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("stages", [3, 4])
def test_depth_counts_the_layers_of_three_stages(depth: int, stages: int) -> None:
    net = network(depth=depth, stages=stages)
    layers = [
        m for m in net.modules()
        if isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3))
    ]  # fmt: skip
    assert len(layers) == 2 + stages * (depth - 2) // 3


@pytest.mark.parametrize(("stages", "side"), [(3, 8), (4, 4)])
def test_the_last_feature_maps(stages: int, side: int) -> None:
    seen = []
    net = build(nn.BatchNorm2d, num_classes=5, shape=(3, 32, 32), depth=8, width=8, stages=stages)
    net.get_submodule(f"layer{stages}").register_forward_hook(
        lambda *call: seen.append(call[-1].shape)
    )
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    assert seen == [(2, 8 * 2 ** (stages - 1), side, side)]


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 16)])
def test_it_takes_small_images(shape: tuple[int, int, int]) -> None:
    net = build(nn.BatchNorm2d, num_classes=10, shape=shape, depth=8, stages=4)
    assert net(torch.randn(3, *shape)).shape == (3, 10)


def test_convolutions_have_no_bias_unless_asked() -> None:
    for conv_bias in (False, True):
        net = network(depth=8, conv_bias=conv_bias)
        convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
        assert {m.bias is not None for m in convolutions} == {conv_bias}


def test_with_zero_init_a_block_starts_as_its_shortcut() -> None:
    for zero in (False, True):
        net = build(nn.BatchNorm2d, num_classes=5, shape=(3, 16, 16), depth=20, zero_init_last=zero)
        blocks = [m for m in net.modules() if isinstance(m, BasicBlock)]
        assert len(blocks) == 9
        for block in blocks:
            assert block.bn1.weight.all()  # a zero there would also start as the shortcut
            x = torch.randn(4, block.conv1.in_channels, 6, 6)
            shortcut = x if block.downsample is None else block.downsample(x)
            assert torch.equal(block(x), shortcut.relu()) is zero


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"depth": 18}, "model.depth=18: one of 8, 20, 32, 56, 110"),
        ({"stages": 2}, "model.stages=2: one of 3, 4"),
        ({"width": 0}, "model.width=0"),
    ],
)
def test_other_shapes_are_refused(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        network(**wrong)


def test_zero_init_needs_a_weight() -> None:
    with pytest.raises(
        ValueError, match="zero_init_last=true needs a norm with a weight: Identity"
    ):
        build(nn.Identity, num_classes=5, shape=(3, 8, 8), depth=8, zero_init_last=True)
