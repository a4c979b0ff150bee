"""What is not provably exact is not folded; models in which it is are in test_fusion."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import register_parametrization as register

from normlab.norms import (
    BatchNorm,
    SeparateBatchNorm,
)
from normlab.surgery import fold, fuse, fusible, neighbours, unfuse

from .zoo import (
    Special,
    assert_same,
    disturb,
    folded,
    pair,
    snapshot,
)


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
