"""Layers of which only the weight or only the bias is left, as torch's BatchNorm2d(bias=False)."""

import copy

import pytest
import torch

from .inputs import lay_out
from .zoo import LAYERS, close, data, make, run

LEARNING = [variant for variant in LAYERS if variant.values[0][0] not in ("lrn", "none")]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("absent", ["weight", "bias"])
@pytest.mark.parametrize("variant", LEARNING)
def test_a_weight_without_a_bias_and_the_reverse(variant, absent, training):
    """The other one acts and learns as beside ones or zeros; both routes of several groups too."""
    whole = make(variant).train(training)
    with torch.no_grad():
        getattr(whole, absent).fill_(float(absent == "weight"))
    part = copy.deepcopy(whole)
    part.register_parameter(absent, None)
    for dtype in (torch.float32, torch.bfloat16):
        for layout in ("contiguous", "channels_last"):
            x, dy = (lay_out(data(seed).to(dtype), layout) for seed in (1, 2))
            expected = run(copy.deepcopy(whole), x, dy)
            expected.pop(f"d{absent}", None)
            close(run(copy.deepcopy(part), x, dy), expected, 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("learning", ["weight", "bias", "neither"])
@pytest.mark.parametrize(
    "variant", [v for v in LEARNING if all(p.requires_grad for p in make(v.values[0]).parameters())]
)
def test_a_parameter_that_does_not_learn_changes_no_other_gradient(variant, learning):
    every = make(variant).train()
    some = copy.deepcopy(every)
    for name, parameter in some.named_parameters():
        parameter.requires_grad_(name == learning)
    for layout in ("contiguous", "channels_last"):
        x, dy = (lay_out(data(seed).float(), layout) for seed in (1, 2))
        expected, found = run(copy.deepcopy(every), x, dy), run(copy.deepcopy(some), x, dy)
        close(found, {name: expected[name] for name in found}, 1e-6)
