"""Every layer that `norms.names()` finds, made from a table of what each must be given.

Tests that hold for all layers, or for all of the batch norm family, are parametrized over this. A
new layer is covered by them as soon as it has its line in ARGUMENTS, and a test fails until then.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from normlab import norms
from normlab.norms import PopulationNorm

SHAPES = [(8, 6), (8, 6, 5), (8, 6, 4, 3), (8, 6, 2, 3, 2)]
IMAGES = (8, 6, 4, 3)

Arguments = dict[str, Any] | Callable[[tuple[int, ...]], dict[str, Any]]

ARGUMENTS: dict[str, list[Arguments]] = {
    "bn": [{}, {"cumulative": True}],
    "frozen": [{}, {"affine": "trainable"}],
    "ghost": [{"nbs": 4}, {"nbs": 4, "grouping": "interleaved", "population": "sequential"}],
    "gn": [{"groups": 2}],
    "instance": [{}],
    "l1": [{}],
    "ln": [{}],
    "ln_channels": [{}],
    "ln_elementwise": [lambda shape: {"shape": shape[2:]}],
    "lrn": [{}],
    "none": [{}],
    "renorm": [{}, {"nbs": 4, "start": 0.0, "r_end": 0.0, "d_end": 0.0}],
    # With specific statistics it wants labels: tests/norms/test_separate*.py.
    "separate": [
        {"num_domains": 1},
        {"num_domains": 2, "share_statistics": True, "share_population": True},
    ],
    "sync": [{}],
    "virtual": [{}, {"extra": 2}, {"reference": 3, "gradient": "all"}],
}
"""Per layer the ways it is tested in: keyword arguments, or a function of x's shape to them."""


def _variants(family: bool) -> list[Any]:
    found = []
    for name in norms.names():
        if not family or issubclass(norms.find(name), PopulationNorm):
            for index in range(len(ARGUMENTS.get(name, []))):
                suffix = f"-{index}" if index else ""
                found.append(pytest.param((name, index), id=name + suffix))
    return found


LAYERS = _variants(family=False)
FAMILY = _variants(family=True)


def arguments(variant: tuple[str, int], shape: tuple[int, ...] = IMAGES) -> dict[str, Any]:
    name, index = variant
    given = ARGUMENTS[name][index]
    return given(shape) if callable(given) else given


def make(variant: tuple[str, int], shape: tuple[int, ...] = IMAGES) -> nn.Module:
    """The layer for inputs of `shape`, its weight and bias random and its population moved."""
    layer = norms.find(variant[0])(shape[1], **arguments(variant, shape))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
        for key, buffer in layer.named_buffers():
            if "running" in key:
                buffer.add_(torch.rand(buffer.shape, generator=generator))
    return layer


def uses_batch(layer: nn.Module) -> bool:
    """Whether the layer can normalize with batch statistics: the family, save frozen layers."""
    return isinstance(layer, PopulationNorm) and layer.train().source == "batch"


def data(seed: int, shape: tuple[int, ...] = IMAGES) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    """y, dx, and the gradients and buffers of the layer, by name; x and dy in any layout."""
    leaf = x.detach().requires_grad_()
    y = layer(leaf)
    y.backward(dy)
    found = {"y": y.detach(), "dx": leaf.grad}
    found |= {f"d{k}": v.grad for k, v in layer.named_parameters() if v.requires_grad}
    return found | {k: v.clone() for k, v in layer.named_buffers()}


def close(actual: dict, expected: dict, atol: float) -> None:
    """Within atol, relative to the largest value of each where that is above 1."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        bound = atol * max(1.0, float(value.double().abs().max()) if value.numel() else 1.0)
        worst = (actual[name].double() - value.double()).abs().max() if value.numel() else 0.0
        assert worst <= bound, f"{name}: {worst} > {bound}"


def in_float64(layer: nn.Module) -> nn.Module:
    return copy.deepcopy(layer).double()
