import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.frozen import forward_backward
from torch import nn

from normlab import build
from normlab.config import compose
from normlab.evaluate import Evaluator
from normlab.norms import BatchNorm, FrozenBatchNorm, GhostBatchNorm
from normlab.norms.base import normalization, population_layers
from normlab.population import EmaBank, Statistics, estimate, using
from normlab.protocols import Protocol

from .checks import numpy
from .inputs import LAYOUTS, cases, lay_out

AFFINE = ["frozen", "trainable", "none"]


def trained(channels=6, affine="frozen", eps=1e-5):
    """The layer with the statistics, weight and bias of some checkpoint."""
    torch.manual_seed(7)
    layer = FrozenBatchNorm(channels, affine=affine, eps=eps)
    with torch.no_grad():
        for value in (*layer.parameters(), layer.running_mean, layer.running_var):
            value.copy_(torch.rand(channels) + 0.5)
    return layer


def constants(layer):
    """Statistics, weight and bias in float64; 1 and 0 where the layer has none."""
    mean, var = numpy(layer.running_mean), numpy(layer.running_var)
    weight = np.ones_like(mean) if layer.weight is None else numpy(layer.weight)
    bias = np.zeros_like(mean) if layer.bias is None else numpy(layer.bias)
    return mean, var, weight, bias


@pytest.mark.parametrize("affine", AFFINE)
@cases([torch.float32, torch.bfloat16, torch.float16])
def test_formula(shape, dtype, layout, affine):
    """P74: the gradient is that of constants, dx = dy weight / sqrt(running_var + eps)."""
    layer = trained(affine=affine)
    layer = layer.double() if dtype == torch.float64 else layer
    x = lay_out(torch.randn(shape, dtype=torch.float64).to(dtype), layout).requires_grad_()
    dy = torch.randn(shape, dtype=torch.float64).to(dtype)
    y = layer.train()(x)
    assert torch.equal(layer.eval()(x), y)
    y.backward(lay_out(dy, layout))
    expected = forward_backward(numpy(x), numpy(dy), *constants(layer), layer.eps)
    atol = {torch.float64: 1e-13, torch.float32: 1e-5}.get(dtype, 4e-2)
    assert y.dtype == x.grad.dtype == dtype
    for tensor, values in zip((y, x.grad), expected[:2], strict=True):
        np.testing.assert_allclose(numpy(tensor), values, rtol=atol, atol=atol)
    if affine == "trainable":
        gradients = layer.weight.grad, layer.bias.grad
        for tensor, values in zip(gradients, expected[2:], strict=True):
            np.testing.assert_allclose(numpy(tensor), values, rtol=10 * atol, atol=10 * atol)
    else:
        assert all(parameter.grad is None for parameter in layer.parameters())


@pytest.mark.parametrize("affine", AFFINE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_is_torchs_layer_in_eval(layout, affine):
    layer = trained(affine=affine)
    reference = nn.BatchNorm2d(6, affine=affine != "none").eval()
    reference.load_state_dict(layer.state_dict(), strict=True)
    x = lay_out(torch.randn(4, 6, 5, 5), layout)
    assert torch.equal(layer.train()(x), reference(x))
    assert torch.equal(layer.eval()(x), reference(x))


def test_a_new_layer_is_the_identity_up_to_eps():
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    layer = FrozenBatchNorm(3, eps=1e-5).double()
    torch.testing.assert_close(layer(x), x / (1 + 1e-5) ** 0.5, rtol=1e-14, atol=0)
    torch.testing.assert_close(layer(x), x, rtol=5.1e-6, atol=0)


@pytest.mark.parametrize("affine", AFFINE)
def test_training_and_train_move_no_buffer(affine):
    """P12: three steps with repeated train() leave the statistics bitwise as they were."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3), trained(affine=affine), nn.ReLU())
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        model.train()
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8)).square().sum().backward()
        optimizer.step()
    after = model.state_dict()
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    learnt = {"1.weight", "1.bias"} if affine == "trainable" else set()
    assert changed == {"0.weight", "0.bias"} | learnt


def test_constant_weight_and_bias_stay_where_a_loop_asks_all_parameters_to_learn():
    layer = trained()
    assert not any(p.requires_grad for p in layer.parameters())
    layer.requires_grad_(True)
    x = torch.randn(4, 6, 3, 3, requires_grad=True)
    layer(x).square().sum().backward()
    assert all(p.grad is None for p in layer.parameters())
    assert x.grad is not None
    assert all(p.requires_grad for p in trained(affine="trainable").parameters())
    assert list(trained(affine="none").parameters()) == []


@settings(max_examples=30, deadline=None)
@given(
    affine=st.sampled_from(AFFINE),
    samples=st.integers(1, 5),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 1000),
)
def test_no_sample_sees_another(affine, samples, layout, seed):
    """P10: neither output nor gradient of a sample depends on the batch around it."""
    layer = trained(affine=affine).double()
    torch.manual_seed(seed)
    x = torch.randn(samples, 6, 3, 3, dtype=torch.float64)
    dy = torch.randn_like(x)

    def run(x, dy):
        x = lay_out(x, layout).requires_grad_()
        y = layer(x)
        (dx,) = torch.autograd.grad(y, x, dy)
        return y.detach(), dx

    together = run(x, dy)
    alone = [run(x[i : i + 1], dy[i : i + 1]) for i in range(samples)]
    for whole, parts in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(whole, torch.cat(parts), rtol=0, atol=1e-13)
    assert layer(x[:0]).shape == (0, 6, 3, 3)


@pytest.mark.parametrize("affine", AFFINE)
def test_zero_variance_is_finite(affine):
    """P13, P14: eps is inside the root, and loading takes nothing off the variance."""
    source = nn.BatchNorm2d(6, affine=affine != "none")
    source.running_var.copy_(torch.tensor([0.0, 1e-12, 1e-8, 1e-5, 1e-3, 1.0]))
    layer = FrozenBatchNorm(6, affine=affine)
    layer.load_state_dict(source.state_dict(), strict=True)
    assert torch.equal(layer.running_var, source.running_var)
    x = torch.randn(4, 6, 3, 3, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    expected = F.batch_norm(
        x, source.running_mean, source.running_var, source.weight, source.bias, False, eps=1e-5
    )
    assert torch.equal(y, expected)


@pytest.mark.parametrize("make", [BatchNorm, lambda c: GhostBatchNorm(c, nbs=4), nn.BatchNorm2d])
def test_loads_from_and_into_batch_norm(make):
    """P15: num_batches_tracked is in both, and kept."""
    source = make(6)
    source(torch.randn(8, 6, 3, 3))
    layer, back = FrozenBatchNorm(6), make(6)
    layer.load_state_dict(source.state_dict(), strict=True)
    back.load_state_dict(layer.state_dict(), strict=True)
    assert list(layer.state_dict()) == list(source.state_dict())
    for key, value in source.state_dict().items():
        assert torch.equal(back.state_dict()[key], value)


@pytest.mark.parametrize("prefix", ["", "1."])
def test_loads_from_frozen_layers_that_count_nothing(prefix):
    """P15: detectron2's and torchvision's frozen layers have no num_batches_tracked."""
    source = trained()
    layer = FrozenBatchNorm(6)
    target = nn.Sequential(nn.ReLU(), layer) if prefix else layer
    state = {f"{prefix}{k}": v for k, v in source.state_dict().items() if "num" not in k}
    given = set(state)
    target.load_state_dict(state, strict=True)
    assert set(state) == given
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in layer.state_dict().items())
    with pytest.raises(RuntimeError, match="running_var"):
        target.load_state_dict({k: v for k, v in state.items() if "var" not in k})


@pytest.mark.parametrize("affine", AFFINE)
def test_no_context_thaws_it(affine):
    """P44: estimators and contexts leave a frozen layer as it is; no estimate names it."""
    layer = trained(affine=affine)
    model = nn.Sequential(BatchNorm(6), layer)
    x = torch.randn(8, 6, 4, 4)
    before = copy.deepcopy(layer.state_dict())
    with normalization(model, statistics="batch", update=True, group_size=2):
        assert layer.source == "population"
        assert torch.equal(layer(x), layer.eval()(x))
        model.train()(x)
    bank = EmaBank(model, [0.5])
    model(x)
    assert set(bank.population(0.5)) == set(estimate(model, [x], estimator="pooled")) == {"0"}
    assert layer.statistics == "population"
    assert all(torch.equal(v, layer.state_dict()[k]) for k, v in before.items())


def test_statistics_can_be_put_in():
    """A value, applied for one evaluation, as for the whole family."""
    layer = trained()
    x = torch.randn(4, 6, 3, 3)
    own = layer(x)
    zeros, ones = torch.zeros(6).double(), torch.ones(6).double()
    with using(layer, {"": Statistics(zeros, ones, 10)}):
        assert not torch.allclose(layer(x), own)
    assert torch.equal(layer(x), own)


@pytest.mark.parametrize("training", [True, False])
def test_other_choices_are_refused_by_name(training):
    """P50: what a frozen layer cannot do is an error, not a silent change of the layer."""
    layer = trained().train(training)
    x = torch.randn(4, 6, 3, 3)
    for statistics in ("batch", None):
        layer.statistics = statistics
        with pytest.raises(ValueError, match="FrozenBatchNorm has constant statistics"):
            layer(x)
    layer.statistics = "population"
    layer.update = True
    with pytest.raises(ValueError, match="update=True"):
        layer(x)


@pytest.mark.parametrize("affine", ["Frozen", True, None])
def test_bad_arguments_are_refused(affine):
    """P4: statistics that never move are asked for by name; there is no decay to get wrong."""
    with pytest.raises(ValueError, match="affine is one of"):
        FrozenBatchNorm(6, affine=affine)
    with pytest.raises(TypeError, match="decay"):
        FrozenBatchNorm(6, decay=1.0)
    with pytest.raises(ValueError, match="7 channels"):
        FrozenBatchNorm(6)(torch.randn(2, 7))


@pytest.mark.parametrize("affine", AFFINE)
def test_gradients_agree_with_numerical_ones(affine):
    layer = trained(2, affine).double()
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)


@pytest.mark.parametrize("affine", AFFINE)
def test_gradients_per_sample(affine):
    """torch.func: vmap over samples of the gradient of one, as torch's layer allows in eval."""
    layer = trained(affine=affine)
    x = torch.randn(4, 6, 3, 3)
    values = dict(layer.named_parameters()) | dict(layer.named_buffers())

    def loss(sample):
        return torch.func.functional_call(layer, values, sample[None]).pow(3).sum()

    per_sample = torch.func.vmap(torch.func.grad(loss))(x)
    x.requires_grad_()
    layer(x).pow(3).sum().backward()
    torch.testing.assert_close(per_sample, x.grad)


@pytest.mark.parametrize("affine", ["frozen", "trainable"])
def test_a_constant_weight_has_no_gradient_under_torch_func(affine):
    layer = trained(affine=affine)
    x = torch.randn(4, 6, 3, 3)

    def loss(weight):
        return torch.func.functional_call(layer, {"weight": weight}, x).pow(3).sum()

    gradient = torch.func.grad(loss)(layer.weight.detach())
    assert bool(gradient.any()) is (affine == "trainable")


def test_compiles_without_graph_breaks_or_affine_part():
    """P73: the compiled layer is the eager one, as with an affine part in tests of all layers."""
    layer = trained(affine="none").train()
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 6, 3, 3)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for call, v in zip((compiled, layer), inputs, strict=True):
        call(v).square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(compiled(x), layer(x))


def test_copies_are_frozen_too():
    layer = copy.deepcopy(trained())
    assert layer.statistics == "population"
    assert not any(p.requires_grad for p in layer.parameters())
    assert torch.equal(layer.running_var, trained().running_var)


def test_every_protocol_is_the_plain_forward():
    """P10: there is nothing to choose, so no NBS is needed and no batch size matters."""
    config = compose(["norm=frozen", "data=digits", "model=tiny", "batch_size=64"])
    dataset = build.data(config)
    model = build.model(config, dataset)
    assert population_layers(model)
    evaluator = Evaluator(model, dataset, nbs=None, seed=0, device=torch.device("cpu"))
    specs = ["val:ema", "val:batch", "val:batch/batch:2", "val:precise", "val:precise_mean"]
    rows = [evaluator.run(Protocol.parse(spec)) for spec in specs]
    assert len({(row["n"], row["error"], row["loss"]) for row in rows}) == 1
    with pytest.raises(ValueError, match="takes no nbs"):
        build.plan(compose(["norm=frozen", "data=digits", "batch_size=64", "nbs=4"]))
