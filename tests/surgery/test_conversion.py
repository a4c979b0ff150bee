import copy
import pickle
import subprocess
import sys

import pytest
import torch
import torchvision
from torch import distributed, nn
from torch.nn.utils import parametrize

import normlab
from normlab.norms import (
    BatchNorm,
    FrozenBatchNorm,
    GhostBatchNorm,
    GroupNorm,
    InstanceNorm,
    NoNorm,
    SyncBatchNorm,
    names,
)
from normlab.population import apply, estimate
from normlab.surgery import convert, revert

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


# -- other layers ---------------------------------------------------------------------------------


def test_torchvisions_frozen_norm():
    """P13, P14, P15, P60: four buffers become frozen parameters under the same four keys, and
    running_var moves unchanged."""
    frozen = disturb(nn.Sequential(torchvision.ops.FrozenBatchNorm2d(4)))
    frozen[0].running_var[0] = 0.0
    before, y = snapshot(frozen), frozen(randn())
    model = convert(frozen, "bn").eval()
    assert_same(before, model.state_dict())
    assert not any(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model(randn()), y, rtol=1e-5, atol=1e-5)
    revert(model)
    assert type(model[0]) is torchvision.ops.FrozenBatchNorm2d
    assert list(model.parameters()) == []
    assert_same(before, model.state_dict())


def test_group_norm():
    model = nn.Sequential(nn.GroupNorm(2, 4, eps=1e-3))
    nn.init.uniform_(model[0].weight)
    before, y = snapshot(model), model(randn())
    convert(model, "gn")
    assert (type(model[0]), model[0].num_groups) == (GroupNorm, 2)
    torch.testing.assert_close(model(randn()), y)
    convert(model, "in")
    assert type(model[0]) is InstanceNorm
    revert(model)
    assert model[0].extra_repr() == nn.GroupNorm(2, 4, eps=1e-3).extra_repr()
    assert_same(before, model.state_dict())


def test_statistics_are_dropped_and_made_up_only_by_permission():
    """P15: a conversion that loses state says which, and by default does not happen."""
    model = stack()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"no place for running_mean, running_var; lossy=True"):
        convert(model, "gn", groups=2)
    assert_same(before, model.state_dict())
    convert(model, "gn", groups=2, lossy=True)
    assert list(model.state_dict()) == ["0.weight", "0.bias"]
    with pytest.raises(ValueError, match="the layer lacks, running_mean, running_var"):
        revert(model)
    revert(model, lossy=True)
    assert torch.equal(model[0].running_mean, torch.zeros(4))
    assert torch.equal(model[0].running_var, torch.ones(4))
    assert torch.equal(model[0].weight, before["0.weight"])
    assert list(model.state_dict()) == list(before)
    with pytest.raises(ValueError, match="GhostBatchNorm needs, and the layer lacks, running_mean"):
        convert(nn.GroupNorm(2, 4), "ghost", nbs=2)
    ghost = convert(nn.GroupNorm(2, 4), "ghost", nbs=2, lossy=True)
    assert type(revert(ghost, lossy=True)) is nn.GroupNorm
    with pytest.raises(ValueError, match="no place for bias, running_mean, running_var, weight"):
        convert(stack(), "none")
    none = convert(stack(eps=1e-3, momentum=0.25), "none", lossy=True)
    assert type(none[0]) is NoNorm
    ghost = convert(none, "ghost", nbs=2, lossy=True)
    assert (ghost[0].eps, ghost[0].decay) == (1e-3, 0.75)


def test_native_layers_of_normlab_need_their_dimensions():
    """P31: no guess of 2d."""
    model = disturb(nn.Sequential(BatchNorm(4, eps=1e-3, decay=0.99)))
    before = snapshot(model)
    with pytest.raises(ValueError, match="give dims"):
        revert(model)
    revert(model, dims=3)
    assert type(model[0]) is nn.BatchNorm3d
    assert (model[0].eps, model[0].momentum) == (1e-3, 0.01)
    assert_same(before, model.state_dict())
    others = revert(nn.Sequential(GroupNorm(4, groups=2), NoNorm(4), InstanceNorm(4, affine=False)))
    assert [type(m) for m in others] == [nn.GroupNorm, nn.Identity, nn.GroupNorm]
    assert others[2].num_groups == 4
    assert others[2].weight is None
    with pytest.raises(ValueError, match="dims is 1, 2 or 3, not 4"):
        revert(model, dims=4)


class Special(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class Lookalike(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(4))
        self.register_buffer("running_var", torch.ones(4))
        self.inner = nn.BatchNorm2d(4)


class OneOfTwo(nn.Module):
    """As timm's EvoNorm2dB0: a running variance without a mean."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_var", torch.ones(4))


@pytest.mark.parametrize(
    "layer", [Special(4), Lookalike(), OneOfTwo()], ids=lambda m: type(m).__name__
)
def test_unknown_norms_are_refused_by_name_or_kept(layer):
    """P24: a subclass may do more than normalize: it is never rebuilt as a bare norm."""
    model = nn.Sequential(nn.BatchNorm2d(4), layer)
    with pytest.raises(ValueError, match=rf"1 is a .*test_conversion.{type(layer).__name__}"):
        convert(model, "bn")
    assert type(model[0]) is nn.BatchNorm2d
    convert(model, "bn", unknown="keep")
    assert type(model[0]) is BatchNorm
    assert model[1] is layer
    assert convert(layer, "bn", unknown="keep") is layer
    assert isinstance(getattr(layer, "inner", nn.BatchNorm2d(4)), nn.BatchNorm2d)


def test_norms_that_are_no_batch_norms_stay():
    layers = [nn.InstanceNorm2d(4, affine=True, track_running_stats=True), nn.LayerNorm(4)]
    model = nn.Sequential(*layers, nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    convert(model, "ghost", nbs=2, only=lambda name, _: name != "3")
    assert list(model)[:2] == layers
    assert [type(m) for m in model][2:] == [GhostBatchNorm, nn.BatchNorm2d]
    revert(model)
    assert list(model)[:2] == layers


def test_bad_requests_change_nothing():
    """P2-P5: torch's momentum becomes a decay or is refused by name."""
    for momentum, line in ((0, "momentum=0 never moves"), (0.0, "momentum=0 never moves")):
        with pytest.raises(ValueError, match=line):
            convert(stack(momentum=momentum), "bn")
    assert convert(stack(momentum=0), "bn", decay=0.9)[0].decay == 0.9
    with pytest.warns(UserWarning, match="torch's momentum"):
        convert(stack(momentum=0.9), "bn")
    with pytest.raises(ValueError, match=r"has no option 'chunks'; it has: decay, eps, grouping"):
        convert(stack(), "ghost", chunks=3)
    with pytest.raises(ValueError, match="no option 'affine'"):
        convert(stack(), "ghost", nbs=2, affine=False)
    with pytest.raises(ValueError, match=r"0 \(BatchNorm2d\): GhostBatchNorm needs nbs"):
        convert(stack(), "ghost")
    with pytest.raises(ValueError, match="no norm 'gost'"):
        convert(stack(), "gost")
    with pytest.raises(ValueError, match="unknown is 'refuse' or 'keep'"):
        convert(stack(), "bn", unknown="drop")
    two = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match=r"1 \(BatchNorm2d\): GroupNorm: 3 channels"):
        convert(two, "gn", groups=2, lossy=True)
    assert type(two[0]) is nn.BatchNorm2d
    with pytest.raises(ValueError, match="TorchScript"):
        convert(torch.jit.script(stack()), "bn")


def test_the_cumulative_average():
    """P5: momentum=None is kept by the norm that has it, and else refused by name."""
    model = stack(momentum=None)
    with pytest.raises(ValueError, match=r"0 \(BatchNorm2d\): momentum=None averages cumulatively"):
        convert(model, "ghost", nbs=2)
    theirs = copy.deepcopy(model)
    convert(model, "bn")
    for _ in range(3):
        assert torch.equal(model(randn()), theirs(randn()))
    assert_same(theirs.state_dict(), model.state_dict())
    native = copy.deepcopy(model)
    vars(native[0]).pop("converted_from")
    assert revert(native, dims=2)[0].momentum is None
    with pytest.raises(ValueError, match="momentum=None"):
        convert(model, "ghost", nbs=2)
    assert revert(model)[0].momentum is None
    assert convert(stack(momentum=0.5), "bn", cumulative=True)[0].cumulative
    assert revert(convert(stack(momentum=0.5), "bn", cumulative=True))[0].momentum is None
    assert revert(convert(stack(momentum=None), "bn", decay=0.75))[0].momentum == 0.25


def test_freezing_and_thawing():
    """P12, P60: constant through train(), in all dimensions; what the conversion froze thaws."""
    model = nn.Sequential(stack(1, momentum=0.003), stack(3))
    model[1][0].bias.requires_grad_(False)
    learns = [p.requires_grad for p in model.parameters()]
    before = snapshot(model)
    convert(model, "frozen")
    convert(model, "frozen")
    assert not any(p.requires_grad for p in model.parameters())
    model[0].train()(randn(1))
    assert_same(before, model.state_dict())
    ghost = convert(copy.deepcopy(model), "ghost", nbs=2)
    assert (ghost[0][0].statistics, ghost[0][0].decay) == (None, 0.997)
    assert [p.requires_grad for p in ghost.parameters()] == learns
    revert(model)
    assert [p.requires_grad for p in model.parameters()] == learns
    assert model[0][0].momentum == 0.003
    assert_same(before, model.state_dict())
    convert(model, "frozen", affine="trainable")
    assert [p.requires_grad for p in model.parameters()] == learns
    with pytest.raises(ValueError, match="no running statistics"):
        convert(stack(track_running_stats=False), "frozen")
    native = revert(nn.Sequential(FrozenBatchNorm(4)), dims=2)
    assert type(native[0]) is nn.BatchNorm2d
    assert convert(nn.BatchNorm2d(4, affine=False), "frozen").weight is None


@pytest.mark.parametrize("norm", names())
def test_every_norm_and_back(norm):
    """P15, P31: each norm takes over a batch norm's state, or says what it cannot."""
    options = {
        "ghost": {"nbs": 4}, "gn": {"groups": 2}, "separate": {"num_domains": 3},
        "virtual": {"extra": 2}, "ln_elementwise": {"shape": (4, 3)},
    }.get(norm, {})  # fmt: skip
    model = stack(momentum=0.25, eps=1e-3).eval()
    before = snapshot(model)
    holds = {"bn", "ghost", "virtual", "renorm", "frozen", "separate", "sync", "l1"}
    if norm == "ln_elementwise":
        with pytest.raises(ValueError, match=r"weight has the shape \(4,\), and"):
            convert(model, norm, lossy=True, **options)
        return
    if norm not in holds:
        with pytest.raises(ValueError, match="running_mean, running_var"):
            convert(model, norm, **options)
    convert(model, norm, lossy=norm not in holds, **options)
    if norm in holds - {"separate"}:
        assert_same(before, model.state_dict())
    if norm in holds - {"separate", "l1"}:
        theirs = stack(momentum=0.25, eps=1e-3).eval()
        torch.testing.assert_close(model(randn()), theirs(randn()), rtol=1e-5, atol=1e-6)
    if norm == "separate":
        assert model[0].running_var.shape == (3, 4)
        assert (model[0].running_var == before["0.running_var"]).all()
        with pytest.raises(ValueError, match=r"running_mean has the shape \(3, 4\)"):
            revert(model)
        return
    revert(model, lossy=norm not in holds)
    assert list(model.state_dict()) == list(before)
    if norm in holds:
        assert_same(before, model.state_dict())


@pytest.fixture
def group():
    """A group of ranks that this process is in: of one rank, so that nothing is exchanged."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.new_group([0])
    distributed.destroy_process_group()


def test_the_group_of_ranks_is_kept(group):
    """P26: through any conversions, copies of the model, and back; or it is refused by name."""
    torchs = nn.SyncBatchNorm(4, process_group=group)
    for steps in (
        [("sync", {})],
        [("sync", {}), ("sync", {"eps": 1e-3})],
        [("sync", {}), ("ghost", {"nbs": 2}), ("frozen", {}), ("sync", {})],
    ):
        layer = nn.Sequential(torchs)
        for norm, options in steps:
            layer = copy.deepcopy(convert(layer, norm, **options))
        assert layer[0].group is group
        assert revert(copy.deepcopy(layer))[0].process_group is group
    native = SyncBatchNorm(4, group=group)
    assert convert(copy.deepcopy(native), "sync", eps=1e-3).group is group
    assert convert(native, "sync", group=None).group is None
    with pytest.raises(ValueError, match="GhostBatchNorm has no place for group; lossy=True"):
        convert(native, "ghost", nbs=2)
    assert convert(native, "ghost", nbs=2, lossy=True).nbs == 2
    assert revert(convert(nn.SyncBatchNorm(4), "sync", group=group)).process_group is group
    assert type(revert(convert(nn.BatchNorm2d(4), "sync", group=group))) is nn.BatchNorm2d
    assert type(revert(SyncBatchNorm(4))) is nn.SyncBatchNorm


def test_what_stands_in_for_torchs_update_bn():
    """P45: torch's own passes over normlab's layers; `estimate` and `apply` do what it would."""
    theirs = stack()
    ours, batches = convert(copy.deepcopy(theirs), "bn"), [randn(), 2 * randn() + 1]
    before = snapshot(ours)
    for model in (theirs, ours):
        torch.optim.swa_utils.update_bn(batches, model)
    assert_same(before, ours.state_dict())
    apply(ours, estimate(ours, batches, estimator="mean"))
    torch.testing.assert_close(ours[0].running_mean, theirs[0].running_mean)
    torch.testing.assert_close(ours[0].running_var, theirs[0].running_var)


def test_a_refusal_leaves_everything_alone():
    """A layer that cannot be converted is found before another one has changed."""
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = stack()
    with pytest.raises(ValueError, match="before DistributedDataParallel wraps it"):
        convert(wrapped, "bn")
    first, calls = nn.BatchNorm2d(4), []
    model = nn.Sequential(first, nn.BatchNorm2d(4, track_running_stats=False))
    first.register_load_state_dict_pre_hook(lambda module, *_: calls.append(module))
    with pytest.raises(ValueError, match="no running statistics"):
        convert(model, "frozen")
    assert model[0] is first
    assert all(p.requires_grad for p in model.parameters())
    model.load_state_dict(model.state_dict())
    assert calls == [first]
