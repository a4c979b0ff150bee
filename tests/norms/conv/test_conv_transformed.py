"""The convolutions that normalize their weights under torch's transformations."""

import copy

import pytest
import torch
from torch import nn

from .test_conv import KINDS, make


class Every(nn.Module):
    """The kinds beside each other: one graph for all."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(make(kind, 3, 4, 3, padding=1) for kind in KINDS)

    def forward(self, x):
        return [layer(x) for layer in self.layers]


def test_compiled_and_exported_without_a_break():
    """P73: outputs and gradients are eager's."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    layers = Every()
    twins = copy.deepcopy(layers)
    compiled = torch.compile(twins, backend="eager", fullgraph=True)
    x = torch.randn(2, 3, 5, 5)
    for call in (compiled, layers):
        sum(y.square().sum() for y in call(x)).backward()
    torch.testing.assert_close(compiled(x), layers(x))
    for p, q in zip(twins.parameters(), layers.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    dynamic = ({0: torch.export.Dim("samples", min=2, max=64)},)
    program = torch.export.export(layers, (x,), dynamic_shapes=dynamic).module()
    more = torch.randn(5, 3, 5, 5)
    torch.testing.assert_close(program(more), layers(more))


@pytest.mark.parametrize("kind", KINDS)
def test_functional_call_and_gradients_per_sample(kind):
    """torch.func: other parameters than its own, which stay; vmap of the gradient of one sample."""
    torch.manual_seed(0)
    layer, twin = make(kind, 3, 4, 3), make(kind, 3, 4, 3)
    own = copy.deepcopy(layer.state_dict())
    parameters = {name: value.detach() for name, value in twin.named_parameters()}
    x = torch.randn(3, 3, 5, 5)

    def loss(parameters, sample):
        return torch.func.functional_call(layer, parameters, (sample[None],)).square().sum()

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for index, sample in enumerate(x):
        twin.zero_grad()
        twin(sample[None]).square().sum().backward()
        for name, parameter in twin.named_parameters():
            torch.testing.assert_close(gradients[name][index], parameter.grad, rtol=1e-4, atol=1e-4)
    assert torch.equal(torch.func.functional_call(layer, parameters, (x,)), twin(x))
    assert all(torch.equal(value, own[name]) for name, value in layer.state_dict().items())
