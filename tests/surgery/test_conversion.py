import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import normlab
from normlab.norms import (
    BatchNorm,
    GhostBatchNorm,
)
from normlab.surgery import convert, revert

from .zoo import TIMM, TORCHVISION, assert_same, build, disturb, randn, snapshot, stack

# -- whole models ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "name"),
    [("torchvision", name) for name in TORCHVISION] + [("timm", name) for name in TIMM],
)
def test_a_model_keeps_its_outputs_and_comes_back_to_the_bit(source, name):
    """P24: with fused activations too, the converted model's outputs in eval are the model's own;
    P15: the same state_dict keys throughout."""
    model = disturb(build(source, name)).eval()
    described = str(model)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    parameters = {name: (p, p.requires_grad) for name, p in model.named_parameters()}
    with torch.no_grad():
        before, y = snapshot(model), model(x)
        assert convert(model, "ghost", nbs=2) is model
        norms = [m for m in model.modules() if isinstance(m, GhostBatchNorm)]
        assert len(norms) > 20
        assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
        assert_same(before, model.state_dict())
        torch.testing.assert_close(model(x), y, rtol=0, atol=1e-5)
        assert revert(model) is model
        assert torch.equal(model(x), y)
    assert_same(before, model.state_dict())
    assert str(model) == described
    after = dict(model.named_parameters())
    assert list(after) == list(parameters)
    assert all(after[n] is p and p.requires_grad == grad for n, (p, grad) in parameters.items())


def test_fused_activations_learn_and_survive_copies():
    """P24: the activation is applied in training too, with drop and act as timm has them."""
    layers = pytest.importorskip("timm.layers")
    torch.manual_seed(0)
    layer = layers.BatchNormAct2d(4, act_layer=nn.PReLU, act_kwargs={"init": 0.3})
    reference = copy.deepcopy(layer)
    keys = list(layer.state_dict())
    layer = convert(nn.Sequential(layer), "bn")
    x = randn()
    assert torch.equal(layer(x), reference(x))
    assert [k.removeprefix("0.") for k in layer.state_dict()] == keys
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(x), reference(x))
        assert torch.equal(copied[0].running_var, reference.running_var) or copied is not layer
        assert type(revert(copied)[0]) is layers.BatchNormAct2d
    layer(x).sum().backward()
    assert layer[0].act.weight.grad is not None


def test_the_package_offers_them_without_loading_torch():
    assert normlab.convert is convert
    assert normlab.revert is revert
    code = "import sys, normlab, normlab.surgery\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
    with pytest.raises(AttributeError, match="no attribute 'invert'"):
        normlab.invert  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'invert'"):
        normlab.surgery.invert  # noqa: B018


# -- what a layer keeps ---------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"nbs": 4, "norm": "ghost"}, {"norm": "bn"}], ids=str)
@pytest.mark.parametrize("kind", [1, 2, 3, "sync"])
def test_round_trip(kind, options):
    """P31, P51, P60: all dimensions come back as what they were, statistics are copies."""
    dims = 2 if kind == "sync" else kind
    model = stack(dims, eps=1e-3, momentum=0.003)
    if kind == "sync":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    before, old = snapshot(model), model[0]
    convert(model, **options)
    new = model[0]
    assert (new.eps, new.momentum, new.decay) == (1e-3, 0.003, 0.997)
    changed = copy.deepcopy(model)
    changed[0].eps = 0.5
    assert revert(changed)[0].eps == 0.5
    assert new.running_mean.data_ptr() != old.running_mean.data_ptr()
    assert new.weight is old.weight
    assert_same(before, model.state_dict())
    revert(model)
    assert type(model[0]) is type(old)
    assert model[0].extra_repr() == old.extra_repr()
    assert_same(before, model.state_dict())


@pytest.mark.parametrize("training", [True, False])
def test_keeps_each_layers_mode(training):
    """P25, P51: `training` of every layer, however mixed, is copied."""
    model = nn.Sequential(stack(), stack()).train()
    model[0].train(training)
    model[0][0].eval()
    modes = [m.training for m in model.modules()]
    convert(model, "ghost", nbs=2)
    assert [m.training for m in model.modules()] == modes
    revert(model)
    assert [m.training for m in model.modules()] == modes


def test_trains_on_as_torch_would():
    """P51: bn is torch's layer, and the optimizer goes on with the same parameters."""
    theirs = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, momentum=0.3))
    ours = copy.deepcopy(theirs)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (theirs, ours)]
    for step in range(4):
        if step == 1:
            convert(ours, "bn")
        if step == 3:
            revert(ours)
        for model, optimizer in zip((theirs, ours), optimizers, strict=True):
            optimizer.zero_grad()
            model(randn()).square().sum().backward()
            optimizer.step()
    assert_same(theirs.state_dict(), ours.state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_keeps_dtype_device_and_requires_grad(dtype):
    model = stack().to(dtype)
    model[0].weight.requires_grad_(False)
    convert(model, "ghost", nbs=2)
    assert {v.dtype for v in model[0].state_dict().values()} == {dtype, torch.long}
    assert [p.requires_grad for p in model.parameters()] == [False, True]
    model.float()
    revert(model)
    assert {v.dtype for v in model[0].state_dict().values()} == {torch.float32, torch.long}
    assert [p.requires_grad for p in model.parameters()] == [False, True]
    meta = convert(nn.Sequential(nn.BatchNorm2d(4, device="meta")), "bn")
    assert {v.device.type for v in revert(meta).state_dict().values()} == {"meta"}


def test_a_layer_alone_comes_back_as_the_new_one():
    layer = convert(nn.BatchNorm2d(4), BatchNorm)
    assert type(layer) is BatchNorm
    assert type(revert(layer)) is nn.BatchNorm2d


def test_keeps_every_kind_of_hook():
    calls = []
    model = stack()
    layer = model[0]
    handles = [
        layer.register_forward_hook(lambda *_: calls.append("forward")),
        layer.register_forward_hook(lambda m, *_, **__: calls.append(m), with_kwargs=True),
        layer.register_forward_pre_hook(lambda *_: calls.append("pre")),
        layer.register_full_backward_hook(lambda *_: calls.append("backward")),
        layer.register_full_backward_pre_hook(lambda *_: calls.append("backward pre")),
        layer.register_state_dict_post_hook(lambda *_: calls.append("state_dict")),
        layer.register_state_dict_pre_hook(lambda *_: calls.append("state_dict pre")),
        layer.register_load_state_dict_pre_hook(lambda m, *_: calls.append(m)),
        layer.register_load_state_dict_post_hook(lambda *_: calls.append("loaded")),
    ]

    def called():
        calls.clear()
        model(randn().requires_grad_()).sum().backward()
        model.load_state_dict(model.state_dict())
        return ["itself" if call is model[0] else call for call in calls]

    before = called()
    assert before.count("itself") == 2
    assert len(before) == 9
    convert(model, "ghost", nbs=2)
    assert called() == before
    handles[0].remove()
    revert(model)
    assert called() == [call for call in before if call != "forward"]
    for handle in handles:
        handle.remove()
    assert called() == []


def test_shared_modules_and_parameters_stay_shared():
    norm, other = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    other.weight = norm.weight
    model = nn.ModuleDict({"a": norm, "b": nn.Sequential(norm, other)})
    keys = list(model.state_dict())
    for change in (lambda: convert(model, "ghost", nbs=2), lambda: revert(model)):
        change()
        assert model["a"] is model["b"][0]
        assert model["a"].weight is model["b"][1].weight
        assert model["a"].bias is not model["b"][1].bias
        assert list(model.state_dict()) == keys
        assert len(list(model.parameters())) == 3


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def test_keeps_parametrizations():
    model = stack()
    parametrize.register_parametrization(model[0], "weight", Doubled())
    before, kept = snapshot(model), model[0].parametrizations["weight"]
    y = model.eval()(randn())
    for change in (lambda: convert(model, "ghost", nbs=2), lambda: revert(model)):
        change()
        assert model[0].parametrizations["weight"] is kept
        assert_same(before, model.state_dict())
        torch.testing.assert_close(model(randn()), y)
    assert parametrize.type_before_parametrizations(model[0]) is nn.BatchNorm2d


@pytest.mark.parametrize("options", [{"affine": False}, {"bias": False}], ids=str)
def test_keeps_what_is_absent(options):
    model = nn.Sequential(nn.BatchNorm2d(4, **options))
    before, y = snapshot(model), model(randn())
    model[0].load_state_dict({k.removeprefix("0."): v for k, v in before.items()})
    convert(model, "ghost", nbs=8)
    assert_same(before, model.state_dict())
    assert torch.equal(model(randn()), y)
    revert(model)
    assert model[0].extra_repr() == nn.BatchNorm2d(4, **options).extra_repr()


def test_what_others_put_on_a_layer_stays_there():
    model = stack()
    model[0].register_buffer("mask", torch.ones(2))
    model[0].register_buffer("unsaved", torch.ones(2), persistent=False)
    before = snapshot(model)
    for change in (lambda: convert(model, "ghost", nbs=2), lambda: revert(model)):
        change()
        assert_same(before, model.state_dict())
        assert model[0].unsaved is not None
    model[0].forward = lambda x: x
    with pytest.raises(ValueError, match="has a forward of its own"):
        convert(model, "bn")


@pytest.mark.parametrize("training", [True, False])
def test_untracked_layers_keep_to_their_batches(training):
    """P51, P60, P11: track_running_stats=False converts, explicitly to batch statistics."""
    theirs = stack(track_running_stats=False).train(training)
    ours = convert(copy.deepcopy(theirs), "bn")
    assert (ours[0].statistics, ours[0].update) == ("batch", False)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert torch.equal(ours(randn()), theirs(randn()))
    convert(ours, "ghost", nbs=2)
    assert (ours[0].statistics, ours[0].update) == ("batch", False)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    revert(ours)
    assert ours[0].running_mean is None
    assert ours[0].extra_repr() == theirs[0].extra_repr()


def test_a_layer_that_stopped_tracking_updates_no_more():
    """P11: track_running_stats set to False after construction."""
    theirs = stack()
    theirs[0].track_running_stats = False
    ours = convert(copy.deepcopy(theirs), "bn")
    before = snapshot(ours)
    assert torch.equal(ours(randn()), theirs(randn()))
    assert_same(before, ours.state_dict())
    assert torch.equal(ours.eval()(randn()), theirs.eval()(randn()))
    assert revert(ours)[0].track_running_stats is False


def test_choices_of_normlabs_layers():
    layer = BatchNorm(4)
    layer.update, layer.group_size, seen = False, 2, []
    layer.observers.append(seen.append)
    model = convert(nn.Sequential(layer), "ghost", nbs=4)
    assert (model[0].update, model[0].group_size) == (False, 2)
    model(randn())
    assert seen[0].mean.shape == (4, 4)
    with pytest.raises(ValueError, match=r"0 \(GhostBatchNorm\).*lossy=True drops them"):
        revert(model, dims=2)
    assert type(revert(model, dims=2, lossy=True)[0]) is nn.BatchNorm2d
    model = convert(stack(), "ghost", nbs=4)
    model[0].update = False
    with pytest.raises(ValueError, match="lossy=True drops them"):
        revert(model)
