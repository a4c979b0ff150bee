import copy

import pytest
import torch
import torchvision
from oracles.fusion import folded as by_definition
from torch import nn

from normlab.norms import (
    BatchNorm,
    BatchRenorm,
    FrozenBatchNorm,
    GhostBatchNorm,
    L1BatchNorm,
    VirtualBatchNorm,
)
from normlab.surgery import convert, fuse, fusible, split, unfuse
from normlab.surgery._transplant import with_activation

from .zoo import (
    TIMM,
    TORCHVISION,
    assert_same,
    build,
    disturb,
    folded,
    pair,
    randomize,
    snapshot,
)

# -- whole models ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "name", "least"),
    [("torchvision", n, k) for n, k in zip(TORCHVISION, (53, 34, 59, 49), strict=True)]
    + [("timm", n, k) for n, k in zip(TIMM, (53, 34, 59, 49), strict=True)],
)
def test_models(source, name, least):
    """Every norm that follows a convolution is folded, the function is kept, and back. DenseNet's
    other norms follow no convolution and stay."""
    model = disturb(build(source, name)).double().eval()
    before = snapshot(model)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        y = model(x)
        assert fuse(model) is model
        assert len(folded(model)) == least
        torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)
        single = copy.deepcopy(model).float()
        torch.testing.assert_close(single(x.float()), y.float(), rtol=1e-5, atol=1e-5)
        assert [p.obstacle for p in fusible(model)] == []
        unfuse(model)
        assert folded(model) == []
        torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)
    after = model.state_dict()
    assert list(after) == list(before)
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, rtol=1e-12, atol=1e-12)


def test_after_a_conversion_with_activations():
    """P24: the activation that came with the norm stays when the norm goes."""
    pytest.importorskip("timm")
    model = disturb(build("timm", "mobilenetv3_small_100")).double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        y = model(x)
        fuse(convert(model, "ghost", nbs=2))
        assert len(folded(model)) == 34
        torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)
        assert sum(isinstance(m, GhostBatchNorm) for m in unfuse(model).modules()) == 34


# -- one pair -------------------------------------------------------------------------------------

PAIRS = [
    ("conv1d", {}), ("conv2d", {}), ("conv3d", {}), ("linear", {}),
    ("conv2d", {"groups": 2, "stride": 2, "padding": 1}), ("conv2d", {"dilation": 2}),
    ("conv2d", {"padding": 2, "padding_mode": "reflect"}),
    ("transposed1d", {}), ("transposed2d", {"groups": 2, "stride": 2}), ("transposed3d", {}),
]  # fmt: skip


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kind", "options"), PAIRS, ids=str)
def test_fold_and_split(kind, options, bias, affine):
    """K9 in float64 to 1e-12 and in float32 to 1e-6 of the outputs' size."""
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        model, x = pair(kind, bias=bias, dtype=dtype, **options)
        if not affine:
            model[1] = type(model[1])(6, affine=False).to(dtype).eval()
            randomize(model[1])
        before = snapshot(model)
        weight = model[0].weight
        y = model(x).detach()
        assert fusible(model)[0].obstacle is None
        fuse(model)
        scale = y.abs().max().item()
        torch.testing.assert_close(model(x), y, rtol=0, atol=bound * scale)
        assert model[0].weight is weight
        assert list(model.state_dict()) == ["0.weight", "0.bias"]
        unfuse(model)
        torch.testing.assert_close(model(x), y, rtol=0, atol=bound * scale)
        after = model.state_dict()
        assert list(after) == list(before)
        for key, value in before.items():
            torch.testing.assert_close(after[key], value, rtol=bound * 100, atol=bound * 10)


def test_the_definition():
    """W' = W gamma / sqrt(rv + eps), b' = (b - rm) gamma / sqrt(rv + eps) + beta."""
    model, _ = pair(norm=nn.BatchNorm2d(6, eps=0.1))
    layer, norm = copy.deepcopy(model)
    fuse(model)
    statistics = norm.running_mean, norm.running_var
    expected = by_definition(layer.weight, layer.bias, norm.weight, norm.bias, *statistics, 0.1)
    torch.testing.assert_close((model[0].weight, model[0].bias), expected)


@pytest.mark.parametrize(
    "norm",
    [BatchNorm(6), GhostBatchNorm(6, nbs=2), FrozenBatchNorm(6), L1BatchNorm(6, eps=0.1),
     BatchRenorm(6), VirtualBatchNorm(6, reference=3), nn.SyncBatchNorm(6),
     torchvision.ops.FrozenBatchNorm2d(6)],
    ids=lambda norm: f"{type(norm).__module__}.{type(norm).__name__}",
)  # fmt: skip
def test_norms_of_the_family(norm):
    model, x = pair(norm=copy.deepcopy(norm))
    if type(norm) in (FrozenBatchNorm, torchvision.ops.FrozenBatchNorm2d):
        model.train()  # constant in training too
    y = model(x).detach()
    torch.testing.assert_close(fuse(model)(x), y, rtol=0, atol=1e-11)
    assert folded(model) == ["1"]
    torch.testing.assert_close(unfuse(model)(x), y, rtol=0, atol=1e-11)
    assert type(model[1]) is type(norm)


def test_fused_training_differs_and_unfuses_to_the_same_function():
    """E22: w1 (w2 x + w3) and w2' x + w3' are one function and have different gradient steps; what
    was learnt fused is a function of the unfused network too."""
    plain, x = pair(bias=False)
    fused = fuse(copy.deepcopy(plain))
    scale = (plain[1].weight / (plain[1].running_var + plain[1].eps).sqrt()).detach()
    target = torch.randn(plain(x).shape, dtype=torch.float64)
    for model in (plain, fused):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        (model(x) - target).square().mean().backward()
        optimizer.step()
    # the same gradient reaches w2' = scale * w2: one SGD step moves scale * w2 by scale^2 as much
    torch.testing.assert_close(
        plain[0].weight.grad, fused[0].weight.grad * scale[:, None, None, None]
    )
    assert not torch.allclose(plain(x), fused(x), atol=1e-3)
    y = fused(x).detach()
    unfused = unfuse(copy.deepcopy(fused).train())
    assert not unfused[1].training
    assert_same({"mean": plain[1].running_mean}, {"mean": unfused[1].running_mean})
    assert unfused[0].bias is None
    torch.testing.assert_close(unfused(x), y, rtol=0, atol=1e-11)
    torch.testing.assert_close(fused(x), y)


@pytest.mark.parametrize("bias", [True, False])
def test_a_weight_of_zero(bias):
    """A norm that blocks a channel (zero-init): folding forgets nothing, and splitting cannot
    make up what was never there."""
    model, x = pair(bias=bias)
    model[1].weight.data[2] = 0
    before, y = snapshot(model), model(x).detach()
    fuse(model)
    torch.testing.assert_close(model(x), y, rtol=0, atol=1e-12)
    model.float().double()
    unfuse(model)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=1e-5, atol=1e-6)
    fuse(model)
    model[0].bias.data += 1
    y = model(x).detach()
    torch.testing.assert_close(unfuse(copy.deepcopy(model))(x), y, rtol=0, atol=1e-11)
    model[0].weight.data += 1
    with pytest.raises(ValueError, match="weight of 0 in a channel where the layer before it is"):
        unfuse(model)
    assert folded(model) == ["1"]


def test_split_takes_any_statistics():
    layer, norm = nn.Conv2d(4, 6, 3).double(), nn.BatchNorm2d(6).double().eval()
    randomize(layer, norm)
    x, weight = torch.randn(2, 4, 5, 5, dtype=torch.float64), norm.weight.detach().clone()
    y = layer(x).detach()
    split(layer, norm, bias=torch.ones(6))
    torch.testing.assert_close(norm(layer(x)), y, rtol=0, atol=1e-12)
    assert torch.equal(layer.bias, torch.ones(6).double())
    assert torch.equal(norm.weight, weight)
    bare = nn.BatchNorm2d(6, affine=False).double().eval()
    y = layer(x).detach()
    split(layer, bare)
    assert layer.bias is None
    torch.testing.assert_close(bare(layer(x)), y, rtol=0, atol=1e-12)
    split(layer, norm, bias=torch.zeros(6).double())
    assert layer.bias is not None
    weight = layer.weight.detach().clone()
    norm.weight.data[0] = 0
    with pytest.raises(ValueError, match="weight of 0 in a channel"):
        split(layer, norm)
    assert torch.equal(layer.weight, weight)
    norm.train()
    with pytest.raises(ValueError, match="batch statistics"):
        split(layer, norm)


def test_the_activation_of_a_folded_norm_moves_with_the_model():
    norm = with_activation(BatchNorm)(6)
    norm.drop, norm.act = nn.Identity(), nn.PReLU()
    model, x = pair(norm=norm, dtype=torch.float32)
    fuse(model).double()
    assert model(x.double()).dtype == torch.float64
    assert unfuse(model)[1].act.weight.dtype == torch.float64


def test_requires_grad_and_device_of_the_new_bias():
    model, _ = pair(bias=False, dtype=torch.float32)
    model[0].weight.requires_grad_(False)
    assert not fuse(model)[0].bias.requires_grad
    model.half()
    unfuse(model)
    assert {v.dtype for v in model.state_dict().values()} == {torch.float16, torch.long}
