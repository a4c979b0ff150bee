"""Fixup: what starts at zero, what starts smaller, and that it is the identity plus nothing."""

import pytest
import torch
from oracles import fixup as by_definition
from torch import nn

from normlab import models
from normlab.models.fixup import Bias, FixupBlock, Scale, branch_factor
from normlab.norms import NoNorm

build = models.find("cifar_resnet")


def network(**options: object) -> nn.Module:
    arguments = {"num_classes": 10, "shape": (3, 16, 16), "depth": 20, "init": "fixup"} | options
    return build(NoNorm, **arguments)


def blocks(net: nn.Module) -> list[FixupBlock]:
    return [module for module in net.modules() if isinstance(module, FixupBlock)]


def test_the_logits_start_at_zero_for_every_image() -> None:
    net = network()
    assert torch.equal(net(100 * torch.randn(4, 3, 16, 16)), torch.zeros(4, 10))


def test_every_branch_starts_at_zero_and_a_block_as_its_shortcut() -> None:
    found = blocks(network())
    assert len(found) == 9
    for block in found:
        x = torch.randn(2, block.conv1.in_channels, 6, 6)
        branch = block.branch(x)
        assert torch.equal(branch, torch.zeros_like(branch))
        shortcut = x if block.downsample is None else block.downsample(x)
        assert torch.equal(block(x), shortcut.relu())


@pytest.mark.parametrize(("depth", "count"), [(8, 3), (20, 9), (56, 27)])
def test_first_convolutions_start_with_he_times_blocks_to_the_minus_half(
    depth: int, count: int
) -> None:
    """P71: the exponent of the authors' code, seen in the weights themselves."""
    torch.manual_seed(0)
    for block in blocks(network(depth=depth, width=32)):
        expected = by_definition.first_deviation(block.conv1.out_channels * 9, count)
        assert block.conv1.weight.std().item() == pytest.approx(expected, rel=0.05)


def test_the_exponent_for_basic_blocks_and_bottlenecks() -> None:
    """P71: -1/2 for m = 2 and -1/4 for m = 3, below 1 for more than one block."""
    assert branch_factor(16, 2) == pytest.approx(16**-0.5)
    assert branch_factor(16, 3) == pytest.approx(16**-0.25)
    for blocks_, convolutions in ((16, 2), (16, 3), (27, 2), (9, 4)):
        expected = by_definition.branch_factor(blocks_, convolutions)
        assert branch_factor(blocks_, convolutions) == pytest.approx(expected)
    assert branch_factor(1, 2) == 1


def test_everything_else_starts_as_without_fixup() -> None:
    torch.manual_seed(0)
    fixup = network()
    torch.manual_seed(0)
    plain = build(NoNorm, num_classes=10, shape=(3, 16, 16), depth=20)
    assert torch.equal(fixup.conv1.weight, plain.conv1.weight)
    own = [m for m in fixup.modules() if isinstance(m, nn.Conv2d)]
    theirs = [m for m in plain.modules() if isinstance(m, nn.Conv2d)]
    assert [m.weight.shape for m in own] == [m.weight.shape for m in theirs]


def test_scalars_stand_before_every_convolution_and_activation() -> None:
    net = network(depth=8)
    biases = [m for m in net.modules() if isinstance(m, Bias)]
    scales = [m for m in net.modules() if isinstance(m, Scale)]
    assert (len(biases), len(scales)) == (2 + 4 * 3, 3)
    assert all(m.bias.shape == (1,) and m.bias.item() == 0 for m in biases)
    assert all(m.scale.shape == (1,) and m.scale.item() == 1 for m in scales)
    assert not any(isinstance(m, NoNorm) for m in net.modules())
    assert all(m.bias is None for m in net.modules() if isinstance(m, nn.Conv2d))


def test_a_block_is_its_formula() -> None:
    torch.manual_seed(0)
    block = FixupBlock(3, 4, 2).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    biases = [getattr(block, f"bias{i}").bias for i in ("1a", "1b", "2a", "2b")]
    assert isinstance(block.downsample, nn.Conv2d)
    filters = block.conv1.weight, block.conv2.weight, block.downsample.weight
    expected = by_definition.block(x, *filters, biases, block.scale.scale, 2)
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("option", ["zero_init_last", "conv_bias"])
def test_options_that_fixup_has_its_own_of_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match=rf"model\.{option}=true: init=fixup has its own"):
        network(**{option: True})
