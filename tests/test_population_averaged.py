"""Averaged weights, and what each policy makes of their buffers (P45)."""

import copy

import pytest
import torch
from oracles.population import averaged_weights
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from normlab.norms import BatchNorm
from normlab.population import AveragedWeights, apply, estimate


def network(dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 8), BatchNorm(8), nn.ReLU(), nn.Linear(8, 8), BatchNorm(8), nn.Linear(8, 3)
    )
    return model.to(dtype)


def data(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(256, 4, generator=generator, dtype=dtype)
    y = (x[:, 0] * x[:, 1] > 0).long() + (x[:, 2] > 1).long()
    return x, y


def steps(model, count, lr=0.5, batch=32):
    """Train, and yield after each step."""
    x, y = data(next(model.parameters()).dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for step in range(count):
        part = slice(step * batch % 256, step * batch % 256 + batch)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.train()(x[part]), y[part]).backward()
        optimizer.step()
        yield step


def loss(model):
    x, y = data(next(model.parameters()).dtype)
    with torch.no_grad():
        return nn.functional.cross_entropy(model.eval()(x), y).item()


@pytest.mark.parametrize("decay", [None, 0.75])
@pytest.mark.parametrize("buffers", ["average", "last"])
def test_weights_and_buffers_are_the_formula_s(decay, buffers):
    model = network()
    averaged = AveragedWeights(model, decay=decay)
    seen = []
    for _ in steps(model, 5):
        averaged.update()
        seen.append(copy.deepcopy(model.state_dict()))
    weights = averaged_weights(5, decay)
    result = averaged.model(buffers=buffers).state_dict()
    for name, value in result.items():
        if name.endswith("num_batches_tracked") or ("running" in name and buffers == "last"):
            assert torch.equal(value, seen[-1][name])
        else:
            expected = sum(float(w) * state[name] for w, state in zip(weights, seen, strict=True))
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("decay", [None, 0.75])
def test_weights_are_torch_s_averaged_model_s(decay):
    model = network()
    function = None if decay is None else get_ema_multi_avg_fn(decay)
    theirs = AveragedModel(model, multi_avg_fn=function)
    averaged = AveragedWeights(model, decay=decay)
    for _ in steps(model, 6):
        averaged.update()
        theirs.update_parameters(model)
    ours = averaged.model(buffers="last")
    for (name, value), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-10, atol=1e-10, msg=name)
    # P45: and what torch's default leaves in the buffers is "last", to the bit.
    for value, other in zip(ours.buffers(), theirs.module.buffers(), strict=True):
        assert torch.equal(value, other)


def test_float32_weights_are_averaged_in_float64():
    """A thousand times the same weights are the same weights, to the bit."""
    model = network(torch.float32)
    averaged = AveragedWeights(model)
    for _ in range(1000):
        averaged.update()
    for name, value in averaged.model(buffers="average").state_dict().items():
        assert value.dtype == model.state_dict()[name].dtype
        assert torch.equal(value, model.state_dict()[name])


@pytest.mark.parametrize("decay", [None, 0.9])
def test_float32_weights_are_rounded_once(decay):
    model = network(torch.float32)
    averaged = AveragedWeights(model, decay=decay)
    seen = []
    for step in steps(model, 40):
        averaged.update()
        now = torch.cat([p.detach().double().flatten() for p in model.parameters()])
        if decay is None:
            seen.append(now)
            expected = torch.stack(seen).mean(0)
        else:
            expected = now if step == 0 else decay * expected + (1 - decay) * now
    result = torch.cat([p.flatten() for p in averaged.model(buffers="last").parameters()])
    off = (result.double() - expected).abs() / expected.abs()
    assert off.max() <= 2.0**-24 * 1.001  # half a unit in the last place of float32


@pytest.mark.parametrize("decay", [None, 0.9])
def test_a_model_averaged_with_itself_has_its_own_precise_statistics(decay):
    """P45: the identity that a policy for the buffers has to satisfy."""
    model = network()
    list(steps(model, 5))
    averaged = AveragedWeights(model, decay=decay)
    for _ in range(4):
        averaged.update()
    batches = data()[0].split(64)
    result = averaged.model(buffers="estimate", batches=batches)
    apply(model, estimate(model, batches, estimator="pooled"))
    for name, value in result.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_buffers_of_other_weights_spoil_an_average():
    """P45: the default of peers. The averaged weights are good, the statistics not theirs."""
    model = network()
    averaged = AveragedWeights(model)
    for step in steps(model, 60, lr=1.0):
        if step >= 20:
            averaged.update()
    batches = data()[0].split(64)
    precise = loss(averaged.model(buffers="estimate", batches=batches))
    last, average = (loss(averaged.model(buffers=policy)) for policy in ("last", "average"))
    assert precise < 0.9 * last
    assert precise < average
    exact = loss(averaged.model(buffers="estimate", batches=batches, estimator="layerwise"))
    assert exact < 0.9 * last


def test_a_parameter_that_does_not_train_stays_to_the_bit():
    model = network(torch.float32)
    model[0].weight.requires_grad_(False)
    averaged = AveragedWeights(model)
    for _ in steps(model, 7):
        averaged.update()
    result = averaged.model(buffers="last")
    assert torch.equal(result[0].weight, model[0].weight)
    assert not result[0].weight.requires_grad
    assert not torch.equal(result[0].bias, model[0].bias)


def test_shared_parameters_and_layers_stay_shared():
    model = network()
    model[3].weight = nn.Parameter(model[0].weight[:, :1].expand(8, 8).detach().clone())
    model.append(nn.Linear(3, 8).double())
    model.append(model[3])
    averaged = AveragedWeights(model)
    averaged.update()
    assert "7.weight" not in averaged.state_dict()["averages"]
    result = averaged.model(buffers="last")
    assert result[7] is result[3]


def test_the_watched_model_is_left_alone():
    model = network()
    model[1].observers.append([].append)
    averaged = AveragedWeights(model)
    list(steps(model, 3))
    averaged.update()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    list(steps(averaged.model(buffers="estimate", batches=[data()[0]]), 2))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes


@pytest.mark.parametrize("decay", [None, 0.9])
def test_resumed_equals_uninterrupted(decay, tmp_path):
    model = network()
    averaged = AveragedWeights(model, decay=decay)
    resumed = None
    for step in steps(model, 6):
        averaged.update()
        if resumed is not None:
            resumed.update()
        if step == 2:
            torch.save(averaged.state_dict(), tmp_path / "a.pt")
            resumed = AveragedWeights(model, decay=decay)
            resumed.load_state_dict(torch.load(tmp_path / "a.pt", weights_only=True))
    ours, theirs = averaged.model(buffers="average"), resumed.model(buffers="average")
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items())


def test_a_state_is_a_value():
    model = network()
    averaged, other = AveragedWeights(model), AveragedWeights(model)
    averaged.update()
    state = averaged.state_dict()
    other.load_state_dict(state)
    before = {name: value.clone() for name, value in state["averages"].items()}
    list(steps(model, 1))
    averaged.update()
    other.update()
    assert all(torch.equal(value, before[name]) for name, value in state["averages"].items())


def test_another_s_state_is_refused():
    averaged = AveragedWeights(network())
    averaged.update()
    with pytest.raises(ValueError, match=r"decay is 0\.9, that of the state None"):
        AveragedWeights(network(), decay=0.9).load_state_dict(averaged.state_dict())
    with pytest.raises(ValueError, match="other weights"):
        AveragedWeights(nn.Linear(4, 8)).load_state_dict(averaged.state_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"buffers": "recompute"}, "buffers is one of"),
        ({"buffers": "estimate"}, "batches belong to buffers='estimate'"),
        ({"buffers": "last", "batches": [torch.randn(4, 4)]}, "batches belong to"),
        ({"buffers": "last"}, "before the first update"),
    ],
)
def test_what_makes_no_model_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        AveragedWeights(network()).model(**arguments)


def test_a_bad_decay_is_refused():
    with pytest.raises(ValueError, match="decay must be in"):
        AveragedWeights(network(), decay=1.0)
