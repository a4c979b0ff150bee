"""What every layer promises under torch's transformations: compile, export, vmap and others."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from .inputs import lay_out
from .zoo import LAYERS, close, data, make, uses_batch


class Every(nn.Module):
    """The layers beside each other, each for an input of its own: one graph to form for all."""

    def __init__(self, variants):
        super().__init__()
        self.layers = nn.ModuleDict({"-".join(map(str, v)): make(v) for v in variants})

    def forward(self, inputs):
        return {name: layer(inputs[name]) for name, layer in self.layers.items()}


def leaves(layers, x):
    return {name: x.detach().clone().requires_grad_() for name in layers.layers}


def _compiled(variants, training, layout, backend):
    torch._dynamo.reset()
    layers = Every(variants).train(training)
    twins = copy.deepcopy(layers)
    compiled = torch.compile(twins, backend=backend, fullgraph=True)
    for seed in (1, 2):
        x, dy = (lay_out(data(s).float(), layout) for s in (seed, seed + 9))
        results = []
        for call in (compiled, layers):
            inputs = leaves(layers, x)
            outputs = call(inputs)
            torch.autograd.backward(list(outputs.values()), [dy] * len(outputs))
            results.append({f"{k} y": y.detach() for k, y in outputs.items()})
            results[-1] |= {f"{k} dx": leaf.grad for k, leaf in inputs.items()}
        for result, module in zip(results, (twins, layers), strict=True):
            named = [(k, v) for k, v in module.named_parameters() if v.requires_grad]
            result |= {f"d {k}": v.grad.clone() for k, v in named} | dict(module.named_buffers())
        close(*results, 1e-5)


FAMILIAR = [parameter.values[0] for parameter in LAYERS]
OWN = [("bn", 1), ("ghost", 1), ("gn", 0), ("l1", 0), ("renorm", 1), ("virtual", 1)]
"""One of each kind of route through torch's operators; BatchNorm's own is in virtual's."""


@pytest.mark.parametrize(
    ("variants", "layout", "backend", "training"),
    [
        (OWN, "contiguous", "aot_eager", True),
        (FAMILIAR, "channels_last", "eager", True),
        (FAMILIAR, "contiguous", "eager", False),
        pytest.param(FAMILIAR, "contiguous", "aot_eager", True, marks=pytest.mark.slow),
    ],
    ids=["train", "train-channels_last", "eval", "train-all"],
)
def test_compiled_without_a_break(variants, layout, backend, training):
    """P73, P5: one graph; outputs, gradients and buffers are eager's, of every layer."""
    _compiled(variants, training, layout, backend)


def test_a_checkpoint_inside_what_is_compiled_updates_once():
    """P18: and has the gradient without either."""
    torch._dynamo.reset()
    layers = Every([("bn", 0), ("ghost", 0)]).train()
    twins = copy.deepcopy(layers)
    x = data(1).float()

    def step(inputs):
        outputs = checkpoint(twins, inputs, use_reentrant=False)
        return sum(y.tanh().sum() for y in outputs.values())

    ours, theirs = leaves(layers, x), leaves(layers, x)
    torch.compile(step, backend="aot_eager")(ours).backward()
    sum(y.tanh().sum() for y in layers(theirs).values()).backward()
    for name, twin in twins.layers.items():
        torch.testing.assert_close(ours[name].grad, theirs[name].grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(twin.running_mean, layers.layers[name].running_mean)
        torch.testing.assert_close(twin.running_var, layers.layers[name].running_var)
        assert twin.num_batches_tracked == 1


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["bn", "ghost", "renorm", "gn"])
def test_compiled_by_inductor(name, layout, training):
    """P73: generated code too."""
    _compiled([(name, 0)], training, layout, "inductor")


def test_export_of_an_evaluation():
    layers = Every(FAMILIAR).eval()
    x = data(1).float()
    samples = torch.export.Dim("samples", min=2, max=64)
    inputs = leaves(layers, x)
    dynamic = ({name: {0: samples} for name in inputs},)
    program = torch.export.export(layers, (inputs,), dynamic_shapes=dynamic).module()
    for n in (8, 3):
        given = dict.fromkeys(inputs, x[:n])
        torch.testing.assert_close(program(given), layers(given))


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
