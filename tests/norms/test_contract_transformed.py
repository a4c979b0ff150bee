"""What every layer promises under torch's transformations: compile, export, vmap and others."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from .formulas import lay_out
from .zoo import LAYERS, close, data, make, run, uses_batch


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
