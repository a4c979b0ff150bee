"""What every layer promises of precision: half inputs, half modules, and means far from 0.

The reference is the layer itself in float64, contiguous, which its own tests hold to the formula.
"""

import copy
from itertools import product

import pytest
import torch

from normlab.norms import _grouped

from .inputs import lay_out
from .zoo import FAMILY, LAYERS, close, data, in_float64, make, run

EPS32 = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", LAYERS)
def test_half_inputs_have_float32_statistics(variant, dtype, training):
    """P65: values near 300, whose squares float16 cannot hold, and variances beyond its range."""
    fresh = make(variant).train(training)
    x, dy = (data(1) * 300).to(dtype), data(2).to(dtype)
    expected = run(in_float64(fresh), x.double(), dy.double())
    for layout in ("contiguous", "channels_last"):
        found = run(copy.deepcopy(fresh), lay_out(x, layout), lay_out(dy, layout))
        assert found["y"].dtype == found["dx"].dtype == dtype
        for name, value in found.items():
            assert value.isfinite().all(), name
            if name not in ("y", "dx"):
                assert value.dtype in (torch.float32, torch.int64), name
        buffers = {name: found[name] for name, _ in fresh.named_buffers()}
        close(buffers, {name: expected[name] for name in buffers}, 1e-6)
        close(found, expected, 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("offset", [1e4, 1e6])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("variant", LAYERS)
def test_offsets_cost_what_float32_rounds_off_a_mean(variant, training, offset):
    """P64: no difference of squares. A spread of 1 about a mean of 1e6 is known to 0.06 in float32.

    The bound is a few units of the mean's own last place. torch's batch norm keeps it too, of so
    few elements; its group norm of channels_last on a CPU is off by 1e3 at a mean of 1e4.
    """
    fresh = make(variant).train(training)
    x, dy = (data(1) + offset).float(), data(2).float()
    expected = run(in_float64(fresh), x.double(), dy.double())
    for layout in ("contiguous", "channels_last"):
        found = run(copy.deepcopy(fresh), lay_out(x, layout), lay_out(dy, layout))
        assert all(value.isfinite().all() for value in found.values())
        if variant[0] == "l1":
            # Its gradient has the sign of x - mean, which rounding decides where the two are near.
            found["dx"] = expected["dx"]
        close(found, expected, 4 * offset * EPS32 + 1e-5)
        assert all((value >= 0).all() for name, value in found.items() if "running_var" in name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("variant", FAMILY)
def test_whatever_cudnn_chooses_is_accurate(variant, monkeypatch):
    """P66: its persistent mode was not, and overflowed; with and without its own choosing."""
    dtypes, layouts = (torch.float32, torch.float16), ("contiguous", "channels_last")
    for dtype, layout, benchmark in product(dtypes, layouts, (False, True)):
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", benchmark)
        layer = make(variant).train()
        x, dy = (data(1) * 300).to(dtype), data(2).to(dtype)
        expected = run(in_float64(layer), x.double(), dy.double())
        found = run(layer.cuda(), lay_out(x.cuda(), layout), lay_out(dy.cuda(), layout))
        found = {name: value.cpu() for name, value in found.items()}
        close(found, expected, 8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", LAYERS)
def test_a_layer_in_half_precision_runs(variant, dtype, gpu, monkeypatch):
    """`model.half()`: parameters and buffers too, by the routes of a CPU, and of what a GPU takes.

    Buffers in half keep what half can say of them; all else is as near as it can be.
    """
    if gpu:  # whose operators want inputs and parameters of one precision
        monkeypatch.setattr(_grouped, "_needs_float32", _grouped.is_half)
    for layout in ("contiguous", "channels_last"):
        layer = make(variant).to(dtype)
        twin = in_float64(layer)
        x, dy = data(1).to(dtype), data(2).to(dtype)
        for training in (True, False):
            layer.train(training)
            twin.train(training)
            found = run(layer, lay_out(x, layout), lay_out(dy, layout))
            expected = run(twin, x.double(), dy.double())
            assert found["y"].dtype == found["dx"].dtype == dtype
            assert all(value.dtype in (dtype, torch.int64) for value in found.values())
            close(found, expected, 8 * torch.finfo(dtype).eps)
            layer.zero_grad()
            twin.zero_grad()


@pytest.mark.parametrize("variant", FAMILY)
def test_float16_buffers_overflow_as_torchs_do(variant):
    """The exception to P65 (docs/pains.md): who casts the buffers too has to have variances below
    65,504. Cast inputs and autocast do not, whatever the layer."""
    x = (data(1) * 1000).half()
    layer, cast = make(variant).train(), make(variant).train().half()
    torchs = torch.nn.BatchNorm2d(x.size(1)).train().half()
    for each in (layer, cast, torchs):
        each(x)
    assert layer.running_var.isfinite().all()
    assert torchs.running_var.isinf().all()
    if layer.source == "batch":
        assert layer.running_var.min() > 65504
        assert cast.running_var.isinf().all()
