"""The kernels as operators: derivatives, compilers and transforms see what they need."""

import pytest
import torch

from normlab import kernels
from normlab.norms import BatchNorm, BatchRenorm, FrozenBatchNorm, GhostBatchNorm

pytestmark = pytest.mark.skipif(not kernels.available(), reason=kernels.unavailable())


@pytest.fixture(autouse=True)
def _on():
    with kernels.use(True):
        yield


def data(*shape, last=False):
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=generator) for _ in range(2))
    return tuple(v.movedim(1, -1).contiguous().movedim(-1, 1) if last else v for v in (x, dy))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_torch_s_own_check_of_operators(own, last):
    """Schemas, fakes, registered derivatives, and traces of them."""
    x, dy = data(4, 6, 5, 3, last=last)
    weight, bias = torch.rand(2, *((2, 6) if own else (6,))).unbind()
    mean, var = kernels.moments(x, groups=2)
    ops = torch.ops.normlab
    leaves = [v.clone().requires_grad_() for v in (x, weight, bias)]
    torch.library.opcheck(ops.batch_norm, (*leaves, 2, False, 1, 1e-5))
    torch.library.opcheck(ops.moments, (x, 2, True))
    torch.library.opcheck(ops.normalize, (x, None, var, weight, bias, 2, False, 1e-5))
    arguments = (dy, x, weight, mean, var, 2, False, 1, 1e-5, True)
    torch.library.opcheck(ops.batch_norm_backward, arguments)
    sums = kernels.gradient_sums(dy, x, mean, var, groups=2, eps=1e-5)
    torch.library.opcheck(ops.gradient_sums, (dy, x, mean, var, 2, 1e-5))
    torch.library.opcheck(ops.gradient, (dy, x, weight, mean, var, sums, 2, 1e-5, 30.0))
    limits = torch.tensor([3.0, 5.0], dtype=torch.float64)
    running = torch.zeros(6), torch.ones(6)
    known = None if own else weight, None if own else bias
    torch.library.opcheck(ops.renorm, (x, *known, *running, limits, 2, 1e-5))
    *_, correction = kernels.renorm(x, *known, *running, limits.unbind(), groups=2, eps=1e-5)
    torch.library.opcheck(ops.renorm_backward, (dy, x, known[0], mean, var, correction, 1e-5, True))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("span", [1, 3])
def test_the_halves_make_the_whole(interleaved, span):
    x, dy = data(6, 6, 5, 3)
    how = {"groups": 3, "interleaved": interleaved, "eps": 1e-5}
    weight, bias = torch.rand(2, 6).unbind()
    y, mean, var = kernels.batch_norm(x, weight, bias, span=span, **how)
    dx, affine = kernels.batch_norm_backward(dy, x, weight, mean, var, span=span, **how)
    with kernels.use(False), torch.enable_grad():
        leaf = x.clone().requires_grad_()  # its formula, by way of the second derivative
        again, _ = kernels.batch_norm_backward(dy, leaf, weight, mean, var, span=span, **how)
    torch.testing.assert_close(dx, again, rtol=1e-4, atol=1e-5)
    if span == 1:
        torch.testing.assert_close(kernels.normalize(x, mean, var, weight, bias, **how), y)
        torch.testing.assert_close(kernels.moments(x, groups=3, interleaved=interleaved)[1], var)
    if span == 1 and not interleaved:
        sums = kernels.gradient_sums(dy, x, mean, var, groups=3, eps=1e-5)
        torch.testing.assert_close(sums.sum(1).float(), affine)
        known = (dy, x, weight, mean, var, sums)
        torch.testing.assert_close(kernels.gradient(*known, groups=3, eps=1e-5, count=30), dx)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("span", [1, 2])
def test_second_derivatives(span, interleaved, last):
    """Those of the pure formula, by autograd in float64."""
    x, dy = data(4, 4, 3, 2, last=last)
    weight, bias = torch.rand(2, 4).unbind()
    leaves = [v.clone().requires_grad_() for v in (x, weight, bias, dy)]
    y, _, _ = kernels.batch_norm(
        *leaves[:3], groups=2, interleaved=interleaved, span=span, eps=1e-3
    )
    first = torch.autograd.grad(y, leaves[:3], leaves[3], create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves, allow_unused=True)

    exact = [v.double().detach().requires_grad_() for v in leaves]
    z = exact[0].reshape(2, 2, 4 // span, span, -1)
    over = (0 if interleaved else 1, 3, 4)
    h = (z - z.mean(over, keepdim=True)) / (z.var(over, correction=0, keepdim=True) + 1e-3).sqrt()
    y = h.reshape(x.shape) * exact[1].view(4, 1, 1) + exact[2].view(4, 1, 1)
    first = torch.autograd.grad(y, exact[:3], exact[3], create_graph=True)
    right = torch.autograd.grad(sum(g.square().sum() for g in first), exact, allow_unused=True)
    for got, expected in zip(second, right, strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-3)


def test_what_has_no_derivative_says_so():
    x, dy = data(4, 3, 2, 2)
    mean, var = kernels.moments(x, groups=1)
    x.requires_grad_()
    for call in (
        lambda: kernels.moments(x, groups=1),
        lambda: kernels.normalize(x, mean, var, None, None, eps=1e-5),
        lambda: kernels.gradient_sums(dy, x, mean, var, eps=1e-5),
        lambda: kernels.renorm(
            x, None, None, torch.zeros(3), torch.ones(3), (3.0, 5.0), groups=1, eps=1e-5
        ),
        lambda: kernels.gradient(dy, x, None, mean, var, torch.zeros(2, 1, 3), eps=1e-5, count=8),
    ):
        with pytest.raises(RuntimeError, match="no derivative"):
            call()


@pytest.mark.parametrize("missing", ["x", "weight", "bias"])
def test_only_what_is_asked_for(missing):
    x, dy = data(4, 3, 5, 2)
    leaves = {"x": x, "weight": torch.rand(3), "bias": torch.rand(3)}
    results = []
    for names in (["x", "weight", "bias"], [name for name in leaves if name != missing]):
        given = {k: v.clone().requires_grad_(k in names) for k, v in leaves.items()}
        y, mean, _ = kernels.batch_norm(**given, groups=2, eps=1e-5)
        assert not mean.requires_grad
        y.backward(dy)
        results.append({k: v.grad for k, v in given.items()})
    assert results[1].pop(missing) is None
    for name, value in results[1].items():
        torch.testing.assert_close(value, results[0][name])


def test_dy_in_any_layout():
    """A sum's gradient has no memory of its own, and others come in another order."""
    x, dy = data(4, 3, 5, 2)
    for given in (x, x.to(memory_format=torch.channels_last)):
        leaf = given.clone().requires_grad_()
        for other in (dy, dy.to(memory_format=torch.channels_last), torch.ones(()).expand_as(dy)):
            y, _, _ = kernels.batch_norm(leaf, None, None, groups=1, eps=1e-5)
            (dx,) = torch.autograd.grad(y, leaf, other)
            (right,) = torch.autograd.grad(
                torch.nn.functional.batch_norm(leaf, None, None, training=True), leaf, other
            )
            torch.testing.assert_close(dx, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ["aot_eager"])
@pytest.mark.parametrize("updates", [None, False])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("nbs", [None, 4])
def test_compiled_renorm_has_the_gradient_of_its_forward(nbs, fused, updates, backend):
    """r and d are those before the update, in a backward that is run after it, too."""
    x, dy = data(8, 6, 4, 3)

    def step(compiled):
        torch._dynamo.reset()
        torch.manual_seed(1)
        ramp = {"forwards": 4, "start": 0.0, "r_end": 0.5, "d_end": 0.5}
        layer = BatchRenorm(6, nbs=nbs, update=updates, **ramp)
        torch.nn.init.normal_(layer.weight)
        layer.running_mean.normal_()
        layer.num_batches_tracked.fill_(1)
        call = torch.compile(layer, backend=backend, fullgraph=True) if compiled else layer
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        return y, *torch.autograd.grad(y, (leaf, layer.weight, layer.bias), dy)

    with kernels.use(fused):
        for got, expected in zip(step(True), step(False), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_graphs_hold_the_operators_and_follow_the_switch():
    layers = torch.nn.Sequential(
        BatchNorm(3), GhostBatchNorm(3, nbs=2), FrozenBatchNorm(3), BatchRenorm(3)
    )
    seen = []

    def backend(graph, _):
        parts = [part for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]
        seen.append({str(node.target) for part in parts for node in part.graph.nodes})
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(layers, backend=backend, fullgraph=True)
    x, _ = data(4, 3, 5, 2)
    compiled(x)
    with kernels.use(False):
        compiled(x)
    for operator in ("batch_norm", "normalize", "renorm"):
        assert any(f"normlab.{operator}" in name for name in seen[0])
    assert {name for name in seen[-1] if "normlab" in name} == {"normlab.kept"}
    assert len(seen) == 2


def test_an_export_runs_without_normlab():
    layers = torch.nn.Sequential(GhostBatchNorm(3, nbs=2), FrozenBatchNorm(3)).eval()
    x, _ = data(4, 3, 5, 2)
    program = torch.export.export(layers, (x,))
    assert not any("normlab" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), layers(x))


def test_autocast_takes_what_the_layer_is_given():
    layer = GhostBatchNorm(3, nbs=2)
    x, dy = data(4, 3, 5, 2)
    leaf = x.bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(leaf)
    assert y.dtype == torch.bfloat16
    y.backward(dy.bfloat16())
    assert layer.weight.grad.dtype == torch.float32
    assert layer.running_mean.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_types_take_the_pure_path(dtype):
    x, _ = data(4, 3, 5, 2)
    assert kernels.takes(x)
    assert not kernels.takes(x.to(dtype))
    assert not kernels.takes(x[..., ::2])
    assert not kernels.takes(x[:0])
    assert torch.func.vmap(lambda v: torch.tensor(float(kernels.takes(v))))(x[None]).sum() == 0
