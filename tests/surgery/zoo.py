"""Models and layers to operate on, and what must be the same afterwards."""

import pytest
import torch
import torchvision
from torch import nn

from normlab.surgery.fusion import FoldedNorm

TORCHVISION = ["resnet50", "mobilenet_v3_small", "densenet121", "efficientnet_b0"]
TIMM = ["resnet50", "mobilenetv3_small_100", "densenet121", "efficientnet_b0"]
SPATIAL = {1: (5,), 2: (4, 3), 3: (2, 3, 2)}


def build(source, name):
    torch.manual_seed(0)
    if source == "timm":
        return pytest.importorskip("timm").create_model(name, num_classes=10)
    return torchvision.models.get_model(name, num_classes=10, weights=None)


def disturb(model):
    """Statistics and weights that are not the initial ones, without running the model."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "running_var", None) is not None:
                shape = module.running_var.shape
                module.running_mean.copy_(torch.randn(shape, generator=generator) * 0.1)
                module.running_var.copy_(torch.rand(shape, generator=generator) + 0.5)
            if getattr(module, "num_batches_tracked", None) is not None:
                module.num_batches_tracked.fill_(7)
            if module.__class__.__name__.startswith("BatchNorm") and module.weight is not None:
                module.weight.copy_(torch.rand(module.weight.shape, generator=generator) + 0.5)
                module.bias.copy_(torch.randn(module.bias.shape, generator=generator) * 0.1)
    return model


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(state, other):
    assert list(state) == list(other)
    for name, value in state.items():
        assert value.dtype == other[name].dtype
        assert torch.equal(value, other[name]), name


def stack(dims=2, **options):
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    return disturb(nn.Sequential(norm(4, **options), nn.ReLU()))


def randn(dims=2, samples=8):
    return torch.randn(samples, 4, *SPATIAL[dims], generator=torch.Generator().manual_seed(2))


class Special(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


def folded(model):
    return [name for name, module in model.named_modules() if isinstance(module, FoldedNorm)]


def randomize(*modules, seed=0):
    """Every weight and statistic at random, none near zero but for what is set so."""
    generator = torch.Generator().manual_seed(seed)
    for module in modules:
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
                positive = "var" in name
                value.data.copy_(noise.abs() + 0.3 if positive else noise)


def pair(kind="conv", *, norm=None, bias=True, dtype=torch.float64, **options):
    """A layer with 6 outputs, a norm in eval(), and an input."""
    dims = {"1d": 1, "2d": 2, "3d": 3}.get(kind[-2:], 2)
    if kind == "linear":
        layer, x = nn.Linear(4, 6, bias=bias), torch.randn(5, 4)
        norm = norm or nn.BatchNorm1d(6)
    else:
        name = ("ConvTranspose" if kind.startswith("transposed") else "Conv") + f"{dims}d"
        layer = getattr(nn, name)(4, 6, 3, bias=bias, **options)
        x = torch.randn(2, 4, *[7] * dims)
        norm = norm or (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](6)
    randomize(layer, norm)
    model = nn.Sequential(layer, norm).to(dtype).eval()
    return model, x.to(dtype)
