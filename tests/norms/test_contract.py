"""What every layer promises, whatever it computes: precision, layouts, copies, compilation, ...

The reference is the layer itself in float64, contiguous and eager, which its own tests hold to the
formula. Parametrized over everything that `norms.names()` finds.
"""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from normlab import norms
from normlab.norms import PopulationNorm

from .formulas import LAYOUTS, lay_out
from .zoo import ARGUMENTS, FAMILY, IMAGES, LAYERS, SHAPES, arguments, make, uses_batch

EPS32 = torch.finfo(torch.float32).eps


def data(seed: int, shape: tuple[int, ...] = IMAGES) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    """y, dx, and the gradients and buffers of the layer, by name; x and dy in any layout."""
    leaf = x.detach().requires_grad_()
    y = layer(leaf)
    y.backward(dy)
    found = {"y": y.detach(), "dx": leaf.grad}
    found |= {f"d{k}": v.grad for k, v in layer.named_parameters() if v.requires_grad}
    return found | {k: v.clone() for k, v in layer.named_buffers()}


def close(actual: dict, expected: dict, atol: float) -> None:
    """Within atol, relative to the largest value of each where that is above 1."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        bound = atol * max(1.0, float(value.double().abs().max()) if value.numel() else 1.0)
        worst = (actual[name].double() - value.double()).abs().max() if value.numel() else 0.0
        assert worst <= bound, f"{name}: {worst} > {bound}"


def in_float64(layer: nn.Module) -> nn.Module:
    return copy.deepcopy(layer).double()


def test_every_layer_has_its_line():
    """One line in ARGUMENTS of tests/norms/zoo.py makes a new layer part of all tests here."""
    assert sorted(ARGUMENTS) == norms.names()


# -- precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", LAYERS)
def test_half_inputs_have_float32_statistics(variant, dtype, training, layout):
    """P65: values near 300, whose squares float16 cannot hold, and variances beyond its range."""
    layer = make(variant).train(training)
    twin = in_float64(layer)
    x = (data(1) * 300).to(dtype)
    dy = data(2).to(dtype)
    found = run(layer, lay_out(x, layout), lay_out(dy, layout))
    expected = run(twin, x.double(), dy.double())
    assert found["y"].dtype == found["dx"].dtype == dtype
    rounding = torch.finfo(dtype).eps
    for name, value in found.items():
        assert value.isfinite().all(), name
        if name not in ("y", "dx"):
            assert value.dtype in (torch.float32, torch.int64), name
    buffers = {name: found[name] for name, _ in layer.named_buffers()}
    close(buffers, {name: expected[name] for name in buffers}, 1e-6)
    close(found, expected, 4 * rounding)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("offset", [1e4, 1e5, 1e6])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("variant", LAYERS)
def test_offsets_cost_what_float32_rounds_off_a_mean(variant, training, offset, layout):
    """P64: no difference of squares. A spread of 1 about a mean of 1e6 is known to 0.06 in float32.

    The bound is a few units of the mean's own last place. torch's batch norm keeps it too; its
    group norm of channels_last on a CPU is off by 1e3 at a mean of 1e4.
    """
    layer = make(variant).train(training)
    twin = in_float64(layer)
    x = (data(1) + offset).float()
    dy = data(2).float()
    found = run(layer, lay_out(x, layout), lay_out(dy, layout))
    expected = run(twin, x.double(), dy.double())
    assert all(value.isfinite().all() for value in found.values())
    if variant[0] == "l1":
        # Its gradient has the sign of x - mean, which rounding decides where the two are near.
        del found["dx"], expected["dx"]
    close(found, expected, 4 * offset * EPS32 + 1e-5)
    for name, value in layer.named_buffers():
        if "var" in name:
            assert (value >= 0).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("benchmark", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("variant", FAMILY)
def test_whatever_cudnn_chooses_is_accurate(variant, dtype, layout, benchmark, monkeypatch):
    """P66: its persistent mode was not, and overflowed; with and without its own choosing."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", benchmark)
    layer = make(variant).train()
    x, dy = (data(1) * 300).to(dtype), data(2).to(dtype)
    expected = run(in_float64(layer), x.double(), dy.double())
    found = run(layer.cuda(), lay_out(x.cuda(), layout), lay_out(dy.cuda(), layout))
    close(
        {name: value.cpu() for name, value in found.items()}, expected, 8 * torch.finfo(dtype).eps
    )


# -- shapes and layouts ---------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("variant", LAYERS)
def test_layouts_change_rounding_only(variant, training, shape, layout):
    """P67: 2 to 5 dimensions; and images in channels_last come out in channels_last."""
    layer = make(variant, shape).train(training)
    if variant[0] == "instance" and len(shape) == 2:
        pytest.skip("one position: refused")
    twin = in_float64(layer)
    x, dy = data(1, shape), data(2, shape)
    laid = lay_out(x.float(), layout)
    found = run(layer, laid, lay_out(dy.float(), layout))
    close(found, run(twin, laid.double().contiguous(), dy.float().double()), 1e-5)
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


@pytest.mark.parametrize("variant", LAYERS)
def test_wrong_channels_are_refused(variant):
    if variant[0] == "none":
        pytest.skip("the identity looks at nothing")
    layer = make(variant)
    with pytest.raises(ValueError, match=r"7|channels"):
        layer(torch.randn(8, 7, 4, 3))
    with pytest.raises(ValueError, match=r"dimensions|\(6,\)"):
        layer(torch.randn(6))


# -- what a training loop does --------------------------------------------------------------------


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


@pytest.mark.parametrize("target", FAMILY)
@pytest.mark.parametrize("source", FAMILY)
def test_a_checkpoint_moves_between_any_two_of_the_family(source, target):
    """P14, P15: strict, no value changed on the way, and the same evaluation."""
    one, other = make(source), make(target)
    if uses_batch(one):
        one.train()(data(1).float())
    other.load_state_dict(one.state_dict(), strict=True)
    assert list(one.state_dict()) == list(other.state_dict())
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
        assert value.data_ptr() != other.state_dict()[name].data_ptr()
    reference = nn.BatchNorm2d(6)
    reference.load_state_dict(other.state_dict(), strict=True)
    if "l1" not in (source[0], target[0]):
        x = data(2).float()
        torch.testing.assert_close(other.eval()(x), one.eval()(x))
        torch.testing.assert_close(reference.eval()(x), one(x))


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


# -- torch's transformations ----------------------------------------------------------------------


def _compiled(variant, training, layout, backend):
    torch._dynamo.reset()
    layer = make(variant).train(training)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, backend=backend, fullgraph=True)
    for seed in (1, 2):
        x, dy = (lay_out(data(s).float(), layout) for s in (seed, seed + 9))
        expected = run(layer, x, dy)
        leaf = x.detach().requires_grad_()
        y = compiled(leaf)
        y.backward(dy)
        found = {"y": y.detach(), "dx": leaf.grad}
        found |= {f"d{k}": v.grad for k, v in twin.named_parameters() if v.requires_grad}
        close(found | dict(twin.named_buffers()), expected, 1e-5)


@pytest.mark.parametrize(
    ("layout", "backend", "training"),
    [
        ("contiguous", "aot_eager", True),
        ("channels_last", "eager", True),
        ("contiguous", "eager", False),
    ],
)
@pytest.mark.parametrize("variant", LAYERS)
def test_compiled_without_a_break(variant, layout, backend, training):
    """P73: one graph; outputs, gradients and buffers are eager's."""
    _compiled(variant, training, layout, backend)


@pytest.mark.parametrize("name", ["bn", "ghost"])
def test_a_checkpoint_inside_what_is_compiled_updates_once(name):
    """P18: and has the gradient without either."""
    torch._dynamo.reset()
    layer = make((name, 0)).train()
    twin = copy.deepcopy(layer)
    x = data(1).float()
    expected = run(nn.Sequential(layer, nn.Tanh()), x, torch.ones_like(x))

    def step(leaf: torch.Tensor) -> torch.Tensor:
        return checkpoint(nn.Sequential(twin, nn.Tanh()), leaf, use_reentrant=False)

    leaf = x.clone().requires_grad_()
    torch.compile(step, backend="aot_eager")(leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, expected["dx"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(twin.running_mean, layer.running_mean)
    torch.testing.assert_close(twin.running_var, layer.running_var)
    assert twin.num_batches_tracked == 1


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["bn", "ghost", "renorm", "gn"])
def test_compiled_by_inductor(name, layout, training):
    """P73: generated code too."""
    _compiled((name, 0), training, layout, "inductor")


@pytest.mark.parametrize("variant", LAYERS)
def test_export_of_an_evaluation(variant):
    layer = make(variant).eval()
    x = data(1).float()
    samples = torch.export.Dim("samples", min=2, max=64)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: samples},))
    for n in (8, 3):
        torch.testing.assert_close(program.module()(x[:n]), layer(x[:n]))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("variant", LAYERS)
def test_functional_call(variant, training):
    """With other parameters and buffers than its own, which stay as they are."""
    layer = make(variant).train(training)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        for value in twin.parameters():
            value.mul_(2)
    tensors = {k: v.detach().clone() for k, v in (*twin.named_parameters(), *twin.named_buffers())}
    before = copy.deepcopy(layer.state_dict())
    x = data(1).float()
    assert torch.equal(functional_call(layer, tensors, (x,)), twin(x))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert all(torch.equal(value, tensors[name]) for name, value in twin.named_buffers())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("variant", LAYERS)
def test_vmap_and_grad(variant, training, layout):
    """Batches of batches, and the gradient of each; torch's layer allows it where none updates."""
    layer = make(variant).train(training)
    if uses_batch(layer):
        layer.train(training).update = False
    x = torch.stack([lay_out(data(seed).float(), layout) for seed in range(3)])
    expected = torch.stack([layer(batch) for batch in x])
    torch.testing.assert_close(vmap(layer)(x), expected)
    parameters = {k: v.detach() for k, v in layer.named_parameters()}

    def loss(parameters, batch):
        return functional_call(layer, parameters, (batch,)).square().sum()

    dx = vmap(grad(loss, argnums=1), in_dims=(None, 0))(parameters, x)
    for batch, gradient in zip(x, dx, strict=True):
        leaf = batch.detach().requires_grad_()
        layer(leaf).square().sum().backward()
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-4, atol=1e-5)
