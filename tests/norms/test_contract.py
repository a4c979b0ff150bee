"""What every layer promises, whatever it computes: layouts, empty batches, copies, checkpoints, ...

The reference is the layer itself in float64, contiguous and eager, which its own tests hold to the
formula. Parametrized over everything that `norms.names()` finds. Precision and torch's
transformations have files of their own.
"""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from normlab import norms
from normlab.norms import L1BatchNorm, PopulationNorm

from .inputs import LAYOUTS, lay_out
from .zoo import (
    ARGUMENTS,
    FAMILY,
    IMAGES,
    LAYERS,
    arguments,
    close,
    data,
    in_float64,
    make,
    run,
    uses_batch,
)  # fmt: skip


def test_every_layer_has_its_line():
    """One line in ARGUMENTS of tests/norms/zoo.py makes a new layer part of all tests here."""
    assert sorted(ARGUMENTS) == norms.names()


@pytest.mark.parametrize(
    ("shape", "layouts"),
    [
        (IMAGES, LAYOUTS),  # each layer's own formula test has all of them in every shape
        ((8, 6), ["contiguous", "permuted"]),
        ((8, 6, 5), ["channels_last", "sliced"]),
        ((8, 6, 2, 3, 2), ["contiguous", "channels_last"]),
    ],
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("variant", LAYERS)
def test_layouts_change_rounding_only(variant, training, shape, layouts):
    """P67: 2 to 5 dimensions; and images in channels_last come out in channels_last."""
    if variant[0] == "instance" and len(shape) == 2:
        pytest.skip("refused: one position")
    fresh = make(variant, shape).train(training)
    x, dy = data(1, shape), data(2, shape)
    expected = run(in_float64(fresh), x.float().double(), dy.float().double())
    for layout in layouts:
        laid = lay_out(x.float(), layout)
        found = run(copy.deepcopy(fresh), laid, lay_out(dy.float(), layout))
        close(found, expected, 1e-5)
        if len(shape) > 3 and layout in ("contiguous", "channels_last"):
            assert found["y"].stride() == laid.stride()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("variant", LAYERS)
def test_an_empty_batch_is_refused_or_stays_empty(variant, training):
    """P22: refused exactly where statistics of nothing were needed, before anything changes."""
    layer = make(variant).train(training)
    before = copy.deepcopy(layer.state_dict())
    x = torch.zeros(0, *IMAGES[1:], requires_grad=True)
    if training and uses_batch(layer):
        with pytest.raises(ValueError, match=r"empty batch|batch of 0 samples"):
            layer(x)
    else:
        y = layer(x)
        y.sum().backward()
        assert y.shape == x.grad.shape == x.shape
        assert all((p.grad == 0).all() for p in layer.parameters() if p.grad is not None)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


NOT_STANDARDIZING = ("none", "lrn", "frozen")


@pytest.mark.parametrize("shape", [(1, 6), (1, 6, 1, 1), (4, 6, 1, 1)])
@pytest.mark.parametrize("variant", LAYERS)
def test_a_single_element_is_no_statistic(variant, shape):
    """P8: whoever would have to standardize one element says so, for any number of samples."""
    layer = make(variant, shape).train()
    alone = shape[0] == 1 if uses_batch(layer) else variant[0] == "instance"
    before = copy.deepcopy(layer.state_dict())
    if alone and variant[0] not in NOT_STANDARDIZING:
        with pytest.raises(ValueError, match=r"more than one element|batch of 1 samples"):
            layer(torch.randn(shape))
        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    else:
        assert layer(torch.randn(shape)).abs().max() > 1e-3


@pytest.mark.parametrize("variant", [v for v in LAYERS if v.values[0][0] != "none"])
def test_wrong_channels_are_refused(variant):
    layer = make(variant)
    with pytest.raises(ValueError, match=r"7|channels"):
        layer(torch.randn(8, 7, 4, 3))
    with pytest.raises(ValueError, match=r"dimensions|\(6,\)"):
        layer(torch.randn(6))


@pytest.mark.parametrize("observed", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("variant", LAYERS)
def test_activation_checkpointing_updates_once(variant, reentrant, observed):
    """P18: two checkpointed forwards, then backward: outputs, gradients and buffers to the bit.

    torch's own batch norm moves its statistics again in the recomputation; the usual advice there
    is momentum 1 - sqrt(1 - m), which is right for a fixed batch only.
    """
    plain = make(variant).train()
    again = copy.deepcopy(plain)
    counts = []
    if observed and isinstance(plain, PopulationNorm):
        plain.observers.append(lambda _: None)
        again.observers.append(counts.append)
    results = []
    for layer, checkpointed in ((plain, False), (again, True)):
        network = nn.Sequential(layer, nn.Tanh(), nn.Flatten())
        leaves = [data(seed).float().requires_grad_() for seed in (1, 2)]
        loss = torch.zeros(())
        for leaf in leaves:
            y = (
                checkpoint(network, leaf, use_reentrant=reentrant)
                if checkpointed
                else network(leaf)
            )
            loss = loss + (y * torch.linspace(0, 1, y.size(1))).sum()
        loss.backward()
        results.append([loss, *(leaf.grad for leaf in leaves), *layer.buffers()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    for one, other in zip(plain.parameters(), again.parameters(), strict=True):
        if one.requires_grad:  # sums over the two forwards, in either order
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-5, atol=1e-5)
    assert len(counts) == (2 if observed and uses_batch(again) else 0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("variant", LAYERS)
def test_two_forwards_before_one_backward(variant, training):
    """P28: as two layers that share weights would, the second begun where the first ended."""
    layer = make(variant).double().train(training)
    first = copy.deepcopy(layer)
    x, z = data(1).requires_grad_(), data(2).requires_grad_()
    (layer(x) * layer(z)).sum().backward()
    x2, z2 = data(1).requires_grad_(), data(2).requires_grad_()
    y = first(x2)
    second = copy.deepcopy(first)
    (y * second(z2)).sum().backward()
    torch.testing.assert_close(x.grad, x2.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(z.grad, z2.grad, rtol=1e-12, atol=1e-12)
    for together, one, other in zip(
        layer.parameters(), first.parameters(), second.parameters(), strict=True
    ):
        if together.requires_grad:
            torch.testing.assert_close(together.grad, one.grad + other.grad)
    assert all(
        torch.equal(value, second.state_dict()[name]) for name, value in layer.state_dict().items()
    )


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@pytest.mark.parametrize("variant", LAYERS)
def test_copies_are_equal_and_apart(variant, copied):
    layer = make(variant).train()
    layer(data(1).float())
    twin = copied(layer)
    assert twin.training
    assert repr(twin) == repr(layer)
    assert [p.requires_grad for p in twin.parameters()] == [
        p.requires_grad for p in layer.parameters()
    ]
    x = data(2).float()
    before = copy.deepcopy(layer.state_dict())
    y = twin(x)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert torch.equal(layer(x), y)
    assert all(
        torch.equal(value, twin.state_dict()[name]) for name, value in layer.state_dict().items()
    )


@pytest.mark.parametrize("source", FAMILY)
def test_a_checkpoint_moves_to_any_other_of_the_family(source):
    """P14, P15: strict, no value changed on the way, and the same evaluation."""
    one, x = make(source), data(2).float()
    if uses_batch(one):
        one.train()(data(1).float())
    stored = one.state_dict()
    expected = one.eval()(x)
    for target in [nn.BatchNorm2d(6), *(make(variant.values[0]) for variant in FAMILY)]:
        target.load_state_dict(stored, strict=True)
        assert list(stored) == list(target.state_dict())
        for name, value in target.state_dict().items():
            assert torch.equal(value, stored[name]), (target, name)
            assert value.data_ptr() != stored[name].data_ptr()
        if isinstance(target, L1BatchNorm) == isinstance(one, L1BatchNorm):
            torch.testing.assert_close(target.eval()(x), expected, msg=repr(target))


@pytest.mark.parametrize("variant", LAYERS)
def test_a_new_layer_starts_at_the_identity_affine(variant):
    """P16: weight one, bias zero, population mean zero and variance one."""
    layer = norms.find(variant[0])(6, **arguments(variant))
    values = {"weight": 1, "bias": 0, "running_mean": 0, "running_var": 1, "num_batches_tracked": 0}
    for name, value in layer.state_dict().items():
        assert (value == values[name]).all(), name


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["ghost", "renorm"])
def test_chunks_cost_no_loop(name, layout):
    """P49: as many operators for 32 chunks as for two."""
    calls = []
    for nbs in (2, 32):
        layer = norms.find(name)(6, nbs=nbs)
        x = lay_out(torch.randn(64, *IMAGES[1:]), layout).requires_grad_()
        with _Count() as counter:
            layer(x).sum().backward()
        calls.append(counter.calls)
    assert calls[0] == calls[1]
