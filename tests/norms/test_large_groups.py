"""Groups in channels_last that are large enough for an operator each: batch norm of each alone."""

from itertools import product

import pytest
import torch
from torch.autograd import gradgradcheck

from normlab import norms
from normlab.norms import _grouped

from .inputs import lay_out
from .zoo import close, data, in_float64, run

SHAPE, NBS = (8, 16, 4, 3), 4


def made(name, absent, **options):
    layer = norms.find(name)(SHAPE[1], nbs=NBS, **options)
    with torch.no_grad():
        for seed, parameter in enumerate(layer.parameters()):
            parameter.copy_(data(seed, parameter.shape) + 2)
    if absent:
        layer.register_parameter(absent, None)
    return layer


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["ghost", "interleaved", "renorm"])
def test_groups_one_by_one(name, dtype, monkeypatch):
    """y, dx, the parameters' gradients and buffers of the layer in float64, contiguous."""
    sizes = []
    monkeypatch.setattr(
        _grouped, "_worth_a_call_each", lambda _, groups, __: sizes.append(groups) or True
    )
    kind = "renorm" if name == "renorm" else "ghost"
    options = {"grouping": name} if name == "interleaved" else {}
    if kind == "renorm":  # whose chunks have affine parts of their own
        options = {"start": 0.0, "r_end": 0.0, "d_end": 0.0}
    # A bfloat16 near 1e4 is a multiple of 64: no spread is left.
    offsets = (0,) if dtype == torch.bfloat16 else (0, 1e4)
    for absent, offset in product((None, "weight", "bias"), offsets):
        layer = made(kind, absent, **options)
        layer = layer.double() if dtype == torch.float64 else layer
        x, dy = (data(1, SHAPE) + offset).to(dtype), data(2, SHAPE).to(dtype)
        expected = run(in_float64(layer), x.double(), dy.double())
        assert not sizes
        found = run(layer, *(lay_out(value, "channels_last") for value in (x, dy)))
        assert sizes.pop() == SHAPE[0] // NBS
        precision = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        close(found, expected, 4 * torch.finfo(dtype).eps + 4 * precision * (offset + 20))


def test_which_groups_are_worth_it():
    x = lay_out(torch.randn(8, 64, 32, 32), "channels_last")
    for half, groups, interleaved, expected in (
        (False, 4, False, False),  # float32 sums of so many lose a spread about a large mean
        (True, 8, False, False),
        (True, 4, False, True),
        (True, 4, True, False),
    ):
        z = x.bfloat16() if half else x
        assert _grouped._worth_a_call_each(z, groups, interleaved) == expected


@pytest.mark.parametrize(
    ("absent", "own"), [(None, False), (None, True), ("weight", False), ("bias", False)]
)
def test_second_derivatives_agree_with_numerical_ones(absent, own):
    """Also of a loss that is linear in y. With weights of each group, too, as batch renorm has."""
    size = (2, 3) if own else (3,)
    known = {"weight": data(3, size) + 2, "bias": data(4, size)}
    if absent:
        del known[absent]
    values = [v.requires_grad_() for v in (data(1, (2, 5, 3)), *known.values())]

    def normalized(z, *affine):
        found = dict(zip(known, affine, strict=True))
        return _grouped._EachGroup.apply(z, found.get("weight"), found.get("bias"), 1e-2)[0]

    assert gradgradcheck(normalized, values, data(2, (2, 5, 3)), fast_mode=True)
    assert gradgradcheck(normalized, values, fast_mode=True)


@pytest.mark.parametrize("name", ["gn", "instance"])
def test_half_group_norm_of_large_maps(name):
    layer = norms.find(name)(4, **({"groups": 2} if name == "gn" else {}))
    with torch.no_grad():
        for seed, parameter in enumerate(layer.parameters()):
            parameter.copy_(data(seed, parameter.shape) + 2)
    x, dy = ((data(seed, (3, 4, 16, 16)) * 300).bfloat16() for seed in (1, 2))
    expected = run(in_float64(layer), x.double(), dy.double())
    laid = lay_out(x, "channels_last")
    found = run(layer, laid, lay_out(dy, "channels_last"))
    close(found, expected, 4 * torch.finfo(torch.bfloat16).eps)
    y = layer(laid.requires_grad_())
    (dx,) = torch.autograd.grad(y, laid, torch.ones_like(y))  # .grad would be laid out anew
    assert y.stride() == dx.stride() == laid.stride()
