"""Conversions of each kind of layer, and what is refused; whole models are in test_conversion."""

import copy

import pytest
import torch
import torchvision
from torch import distributed, nn

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

from .zoo import Special, assert_same, disturb, randn, snapshot, stack


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
    with pytest.raises(ValueError, match=rf"1 is a surgery.*\.{type(layer).__name__},"):
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


def test_an_eps_of_0_needs_another():
    """torch's layer takes it, and refuses to train with it."""
    model = nn.Sequential(nn.BatchNorm2d(3, eps=0.0))
    with pytest.raises(ValueError, match="eps must be positive during training"):
        model(torch.randn(2, 3, 2, 2))
    with pytest.raises(ValueError, match=r"^0 \(BatchNorm2d\): eps must be above 0 .*, not 0.0"):
        convert(model, "bn")
    assert convert(model, "bn", eps=1e-5)[0].eps == 1e-5


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm2d])
def test_torchs_classes_are_no_successors(norm):
    """They know no decay: their momentum would be 0.1 again, whatever the old layer's was."""
    model = nn.Sequential(nn.BatchNorm2d(4, momentum=0.01))
    with pytest.raises(ValueError, match=rf"{norm.__name__} takes momentum, not .*norm='sync'"):
        convert(model, norm)
    assert model[0].momentum == 0.01
    assert round(convert(model, "sync")[0].momentum, 12) == 0.01


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(nn.LayerNorm(3)), nn.ReLU()])
def test_a_model_without_a_norm_is_refused(model):
    with pytest.raises(ValueError, match=f"no batch or group norm .*in {type(model).__name__}$"):
        convert(model, "ghost", nbs=4)
    assert revert(model) is model


def test_a_choice_of_none_is_refused():
    with pytest.raises(ValueError, match="in Sequential where `only` is true"):
        convert(nn.Sequential(nn.BatchNorm2d(3)), "bn", only=lambda name, _: name == "1")
