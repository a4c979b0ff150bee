import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils.parametrize import register_parametrization as register

from normlab.norms import (
    BatchNorm,
    BatchRenorm,
    FrozenBatchNorm,
    GhostBatchNorm,
    L1BatchNorm,
    SeparateBatchNorm,
    VirtualBatchNorm,
)
from normlab.surgery import convert, fold, fuse, fusible, neighbours, split, unfuse
from normlab.surgery._transplant import with_activation
from normlab.surgery.fusion import FoldedNorm

from .test_conversion import TIMM, TORCHVISION, Special, assert_same, build, disturb, snapshot


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
    scale = norm.weight / (norm.running_var + 0.1).sqrt()
    torch.testing.assert_close(model[0].weight, layer.weight * scale[:, None, None, None])
    torch.testing.assert_close(model[0].bias, (layer.bias - norm.running_mean) * scale + norm.bias)


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


# -- what is not provably exact -------------------------------------------------------------------


def test_training_mode_is_refused():
    model, _ = pair()
    before = snapshot(model)
    model.train()
    with pytest.raises(ValueError, match=r"0 and 1: the norm would use batch .* call eval\(\)"):
        fuse(model)
    assert folded(fuse(model, partial=True)) == []
    own, _ = pair(norm=BatchNorm(6))
    own[1].statistics = "batch"
    with pytest.raises(ValueError, match="batch statistics"):
        fuse(own)
    assert_same(before, model.state_dict())


def test_no_running_statistics_is_refused():
    """P75: found before anything changes, in words."""
    model, _ = pair(norm=nn.BatchNorm2d(6, track_running_stats=False))
    with pytest.raises(ValueError, match="the norm has no running statistics"):
        fuse(model)
    with pytest.raises(ValueError, match="the norm has no running statistics"):
        fold(*model)


def hooked(module):
    module.register_forward_hook(lambda *_: None)


class Standardized(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight, self.bias)


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (lambda m: hooked(m[0]), "Conv2d has hooks"),
        (lambda m: hooked(m[1]), "BatchNorm2d has hooks"),
        (lambda m: m[0].register_full_backward_hook(lambda *_: None), "Conv2d has hooks"),
        (lambda m: register(m[0], "weight", nn.Identity()), "may compute otherwise"),
        (lambda m: register(m[1], "weight", nn.Identity()), "may do more"),
        (lambda m: m.__setitem__(0, Standardized(4, 6, 3)), "Standardized may compute otherwise"),
        (lambda m: m.__setitem__(1, Special(6).eval()), "Special may do more than normalize"),
        (lambda m: m.__setitem__(1, SeparateBatchNorm(6, num_domains=2).eval()), "may do more"),
        (lambda m: nn.utils.weight_norm(m[0]), "Conv2d has a parametrized weight"),
        (lambda m: m.__setitem__(1, nn.BatchNorm2d(5).eval()), "6 outputs, the norm 5 channels"),
        (lambda m: vars(m[0]).update(forward=lambda x: x), "a forward was put on"),
        (lambda m: m.append(m[0]), "0 is at two places"),
        (lambda m: m.append(nn.Sequential(m[1])), "1 is at two places"),
        (lambda m: m.append(share(m[0])), "0 shares a parameter"),
    ],
)  # fmt: skip
def test_obstacles(spoil, line):
    model, _ = pair(dtype=torch.float32)
    spoil(model)
    with pytest.raises(ValueError, match=line):
        fuse(model, [("0", "1")])
    assert folded(model) == []


def share(layer):
    other = copy.deepcopy(layer)
    other.weight = layer.weight
    return other


class Residual(nn.Module):
    def __init__(self, use):
        super().__init__()
        self.conv, self.norm, self.use = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), use

    def forward(self, x, skip=None):
        y = self.conv(x)
        z = self.norm(y)
        if self.use == "sum":
            return z + y
        if self.use == "twice":
            return self.norm(self.conv(z))
        if self.use == "weight":
            return z * self.conv.weight.sum()
        if self.use == "data" and z.sum() > 0:
            return z
        return z if skip is None else y + skip


@pytest.mark.parametrize(
    ("use", "line"),
    [
        ("sum", "the output of conv has 2 users"),
        ("twice", "called more than once"),
        ("weight", "the model reads their parameters"),
        ("data", "torch.fx cannot trace Residual"),
    ],
)
def test_the_data_flow_decides(use, line):
    model = Residual(use).eval()
    with pytest.raises(ValueError, match=line):
        fuse(model)
    assert folded(model) == []
    assert folded(fuse(Residual("norm").eval())) == ["norm"]


class Remembers(nn.Module):
    """Leaves things behind in every way, without a word in the graph."""

    def __init__(self, keep):
        super().__init__()
        self.conv, self.norm, self.keep = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), keep
        self.calls, self.last, self.seen = 0, None, {"inputs": [], "outputs": {}}
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x):
        y = self.conv(x)
        self.calls += 1
        self.last = x
        self.count += 1
        self.seen["inputs"].append(x)
        if self.keep == "in a dictionary":
            self.seen["outputs"]["conv"] = (y,)
        elif self.keep == "as an attribute":
            self.conv.output = y
        return self.norm(y) * torch.rand(()) * torch.ones(1)


@pytest.mark.parametrize("keep", ["not at all", "as an attribute", "in a dictionary"])
def test_tracing_leaves_nothing_behind_and_sees_what_the_model_would(keep):
    model, random = Remembers(keep).eval(), torch.get_rng_state()
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    (found,) = fusible(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert (model.calls, model.last, model.count.item()) == (0, None, 0)
    assert model.seen == {"inputs": [], "outputs": {}}
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    kept = None if keep == "not at all" else "the model keeps the output of conv"
    assert found.obstacle == kept


@pytest.mark.parametrize(("inside", "obstacle"), [(True, "0 has hooks"), (False, None)])
def test_a_hook_around_the_layer_sees_its_output_and_is_not_called(inside, obstacle):
    calls = []
    model = nn.Sequential(nn.Sequential(*pair()[0]), nn.Sequential(*pair()[0]))
    block = model[0] if inside else model
    block.register_forward_hook(lambda *_: calls.append("called"))
    assert [p.obstacle for p in fusible(model)] == [obstacle, None]
    assert calls == []
    assert len(block._forward_hooks) == 1


@pytest.mark.parametrize(
    ("pairs", "line"),
    [
        ([("c", "a"), ("c", "b")], "c and a: c is in two pairs; c and b: c is in two pairs"),
        ([("c", "a"), ("d", "a")], "a is in two pairs"),
        ([("c", "a"), ("c", "a")], "c is in two pairs"),
    ],
)
def test_a_layer_is_folded_once(pairs, line):
    conv, norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    layers = {"c": conv, "d": copy.deepcopy(conv), "a": norm, "b": copy.deepcopy(norm)}
    model = nn.ModuleDict(layers).eval()
    before = snapshot(model)
    with pytest.raises(ValueError, match=line):
        fuse(model, pairs)
    assert folded(fuse(model, iter(pairs), partial=True)) == []
    assert_same(before, model.state_dict())


def test_what_cannot_be_traced_is_the_callers_knowledge():
    class Dynamic(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU())

        def forward(self, x):
            return self.body(x) if x.sum() > 0 else self.body(-x)

    model = disturb(Dynamic()).double().eval()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    y = model(x)
    with pytest.raises(ValueError, match=r"cannot trace Dynamic.*give pairs"):
        fuse(model)
    assert neighbours(model) == [("body.0", "body.1")]
    torch.testing.assert_close(fuse(model, neighbours(model))(x), y, rtol=0, atol=1e-12)


def test_channels_elsewhere_are_noticed():
    """A linear layer's outputs (N, L, F) have F last, where the norm's channels are L."""
    model, x = pair("linear")
    fuse(model)
    model(x)
    with pytest.raises(ValueError, match="takes 2 dimensions"):
        model(torch.randn(5, 6, 4, dtype=torch.float64))


def test_a_fused_model_is_a_model_like_any_other():
    model, x = pair()
    y = fuse(model)(x)
    copied = copy.deepcopy(model)
    assert copied[1].pair[0] is copied[0]
    assert torch.equal(copied(x), y)
    assert [p.obstacle for p in fusible(model)] == []
    assert fuse(model) is model
    with pytest.raises(ValueError, match="is not in the model"):
        unfuse(nn.Sequential(nn.Conv2d(4, 6, 3), model[1]))
