"""Dtypes and arguments that no layer takes: one clear line, before any state changes."""

import copy

import pytest
import torch
from torch import nn

from normlab import kernels, norms

from .zoo import LAYERS, arguments, data, make

NORMS = [v for v in LAYERS if v.values[0][0] != "none"]  # which takes whatever there is
KERNELS = [False, *[True] * kernels.available()]


def wider(dtype):
    return torch.float32 if dtype == torch.bfloat16 else torch.float64


@pytest.mark.parametrize("fused", KERNELS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("variant", NORMS)
def test_dtypes(variant, training, fused):
    """An integer's mean is none; a float64 input's precision is not the layer's."""
    layer = make(variant).train(training)
    own = next((v.dtype for v in layer.state_dict().values()), None)
    refused = [torch.int64, torch.uint8, torch.bool, torch.complex64]
    before = copy.deepcopy(layer.state_dict())
    with kernels.use(fused):
        for dtype in refused if own is None else [*refused, torch.float64]:
            with pytest.raises(ValueError, match=rf"{type(layer).__name__} .*{dtype}"):
                layer(data(1).to(dtype))
        assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert layer(data(1).to(dtype)).dtype == dtype
        if own is not None:
            for cast, given in ((torch.float64, torch.float32), (torch.bfloat16, torch.float32)):
                with pytest.raises(ValueError, match=f"in {cast} got an input in {given}"):
                    layer.to(cast)(data(1).to(given))


@pytest.mark.parametrize("variant", NORMS)
def test_arguments(variant):
    kind, given = norms.find(variant[0]), arguments(variant)
    for channels in (6.0, True, 0, "6", None):
        with pytest.raises(ValueError, match="num_features must be a whole number of at least 1"):
            kind(channels, **given)
    names = kind.__init__.__annotations__
    for eps in (0.0, -1.0, torch.inf, torch.nan, None, "small"):
        if "eps" in names:
            with pytest.raises(ValueError, match="eps must be above 0 and finite, not "):
                kind(6, **given, eps=eps)
    for decay in (1.0, -0.1, torch.nan, None, "0.9"):
        if "decay" in names:
            with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), not "):
                kind(6, **given, decay=decay)


@pytest.mark.parametrize("option", ["groups", "channels_per_group"])
@pytest.mark.parametrize("number", [2.0, True, 0, "2"])
def test_groups(option, number):
    with pytest.raises(ValueError, match=f"{option} must be a whole number of at least 1"):
        norms.find("gn")(6, **{option: number})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 5.0}, "size must be a whole number"),
        ({"alpha": torch.inf}, "alpha must be at least 0 and finite"),
        ({"beta": torch.nan}, "beta must be finite"),
        ({"k": torch.inf}, "k must be above 0 and finite"),
        ({"beta": None}, "beta must be finite"),
    ],
)
def test_local_response_norm(options, message):
    with pytest.raises(ValueError, match=message):
        norms.find("lrn")(6, **options)


def of_two_dtypes(rank):
    layer = norms.find("sync")(6)
    x = data(rank).to(torch.float64 if rank == 1 else torch.float32)
    try:
        layer(x)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_all_ranks_hear_of_a_dtype(ranks):
    """P27: nobody waits for a rank that refuses its input."""
    told = ranks.run(of_two_dtypes)
    assert told.pop(1).startswith("ValueError: SyncBatchNorm in torch.float32 got an input in")
    assert set(told) == {
        "RuntimeError: ranks [1] refuse what a synchronized layer is called with there"
    }


def test_autocast_is_taken():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = nn.Sequential(nn.Conv2d(6, 6, 3), make(("bn", 0)))(data(1, (2, 6, 5, 5)).float())
    assert y.dtype == torch.bfloat16
