"""The four choices of a batch norm, every combination of them, for every layer of the family."""

import copy
from contextlib import nullcontext
from itertools import combinations, product

import pytest
import torch
from oracles import frozen, l1
from torch import nn

from normlab.norms import L1BatchNorm, normalization
from normlab.population import EmaBank, estimate, using

from .checks import numpy
from .zoo import FAMILY, IMAGES, arguments, make, uses_batch

STATISTICS = ("batch", "population", None)
UPDATE = (True, False, None)
FORMATION = (None, 2)  # the layer's own, groups of two samples
POPULATION = ("own", "estimated", "averaged")
CHOOSING = [variant for variant in FAMILY if uses_batch(make(variant.values[0]))]
CONSTANT = [variant for variant in FAMILY if variant not in CHOOSING]
CHOICES = list(product(STATISTICS, UPDATE, FORMATION, POPULATION, (True, False)))


def state(layer: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(layer.state_dict())


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def data(seed: int, shape: tuple[int, ...] = IMAGES) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def population_of(layer: nn.Module, kind: str):
    """What is used in place of the buffers' own values."""
    if kind == "own":
        return None
    if kind == "estimated":
        return estimate(layer, [data(7)], estimator="pooled")
    bank = EmaBank(layer, [0.5])
    layer.train()(data(7))
    bank.detach()
    return bank.population(0.5)


def by_population(layer: nn.Module, x: torch.Tensor, values=None) -> torch.Tensor:
    """The formula in float64, with `values` or what the buffers hold."""
    mean, var = layer.populations()[""] if values is None else (values.mean, values.var)
    given = [numpy(value) for value in (x, mean, var, layer.weight, layer.bias)]
    if isinstance(layer, L1BatchNorm):
        return torch.from_numpy(l1.at_test(*given, layer.eps))
    return torch.from_numpy(frozen.forward_backward(given[0], given[0], *given[1:], layer.eps)[0])


def legal(statistics: str | None, update: bool | None, training: bool) -> bool:
    """update=True asks for batch statistics; everything else is allowed."""
    used = statistics or ("batch" if training else "population")
    return used == "batch" or update is not True


@pytest.mark.parametrize("variant", CHOOSING)
def test_every_combination_runs_a_step_or_is_refused_by_name(variant):
    """P50: 108 of them; a refusal says what it needs, and has changed nothing."""
    fresh = make(variant)
    populations = {kind: population_of(copy.deepcopy(fresh), kind) for kind in POPULATION}
    outputs = [
        by_population(fresh, data(1), (populations[k] or {"": None})[""]) for k in POPULATION
    ]
    assert all((one - other).abs().max() > 1e-2 for one, other in combinations(outputs, 2))
    for statistics, update, group_size, kind, training in CHOICES:
        layer = copy.deepcopy(fresh)
        asked = f"{statistics=} {update=} {group_size=} {kind=} {training=}"
        context = nullcontext() if kind == "own" else using(layer, populations[kind])
        layer.train(training)
        layer.statistics, layer.update, layer.group_size = statistics, update, group_size
        if not legal(statistics, update, training):
            before = state(layer)
            with pytest.raises(ValueError, match="update=True needs statistics='batch'"):
                layer(data(1))
            assert same(state(layer), before), asked
            continue
        x = data(1).requires_grad_()
        with context:
            before = state(layer)
            y = layer(x)
            y.square().sum().backward()
            moved = not same(
                {k: v for k, v in state(layer).items() if "running" in k},
                {k: v for k, v in before.items() if "running" in k},
            )
        used = statistics or ("batch" if training else "population")
        updates = used == "batch" and (training if update is None else update)
        assert moved == updates, asked
        assert y.isfinite().all(), asked
        assert x.grad.isfinite().all(), asked
        if used == "population":
            values = None if kind == "own" else populations[kind][""]
            expected = by_population(layer, x.detach(), values)
            torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5, msg=asked)
        # Samples see each other exactly where batch statistics normalize.
        layer.update = None if used == "population" else False
        other = data(1)
        other[-1] += 3
        with torch.no_grad():
            reaches = not torch.equal(layer(other)[:-1], layer(data(1))[:-1])
        assert reaches == (used == "batch"), asked


@pytest.mark.parametrize("variant", CONSTANT)
def test_a_layer_of_constants_refuses_by_name(variant):
    """P50: where there is nothing to choose, choosing it is refused, and what is legal runs."""
    layer = make(variant)
    for statistics, update in product(("population", "batch", None), UPDATE):
        layer.statistics, layer.update = statistics, update
        before = state(layer)
        if statistics == "population" and update is not True:
            assert layer(data(1)).isfinite().all()
        else:
            with pytest.raises(ValueError, match=r"constant statistics|update=True needs"):
                layer(data(1))
        assert same(state(layer), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"statistics": "population", "update": True}, "update=True needs statistics='batch'"),
        ({"statistics": "ema"}, "'batch' or 'population', not 'ema'"),
        ({"update": "no"}, "True, False or None, not 'no'"),
        ({"group_size": 0}, "group_size must be at least 1"),
    ],
)
@pytest.mark.parametrize("variant", FAMILY)
def test_contradictions_are_refused_where_they_are_set(variant, arguments, message):
    """P50: before anything runs."""
    layer = make(variant)
    with pytest.raises(ValueError, match=message), normalization(layer, **arguments):
        pass


@pytest.mark.parametrize("variant", FAMILY)
def test_the_choices_are_arguments_too(variant):
    """P50: what contradicts itself is refused at construction; what is constant has no choice."""
    layer, given = type(make(variant)), arguments(variant)
    if not uses_batch(make(variant)):
        with pytest.raises(TypeError, match="statistics"):
            layer(6, statistics="batch", **given)
        return
    for statistics, update in product(STATISTICS, UPDATE):
        asked = {"statistics": statistics, "update": update, **given}
        if statistics == "population" and update:
            with pytest.raises(ValueError, match="update=True needs statistics='batch'"):
                layer(6, **asked)
            continue
        made, assigned = layer(6, **asked), layer(6, **given)
        assigned.statistics, assigned.update = statistics, update
        assert made.frozen == (statistics == "population")
        assert torch.equal(made(data(1)), assigned(data(1)))
        assert same(state(made), state(assigned))
    for wrong in ({"statistics": "ema"}, {"update": "no"}):
        with pytest.raises(ValueError, match=r"not '(ema|no)'"):
            layer(6, **wrong, **given)


@pytest.mark.parametrize("variant", CHOOSING)
def test_a_discriminator_learns_the_population_of_real_data_alone(variant):
    """P62: D(real), then D(fake) without an update, in one step; buffers and gradients."""
    real, fake = data(1), data(2) * 3 + 5
    layer = make(variant)
    alone = copy.deepcopy(layer)
    alone(real)
    on_real = layer(real)
    with normalization(layer, update=False):
        on_fake = layer(fake)
    assert same(state(layer), state(alone))
    (on_real.square().mean() + on_fake.square().mean()).backward()
    assert layer.weight.grad.isfinite().all()
    mixed = make(variant)
    mixed(real)
    mixed(fake)
    assert not torch.allclose(mixed.running_mean, alone.running_mean)


@pytest.mark.parametrize("variant", FAMILY)
def test_training_on_population_statistics_has_frozen_batch_norm_s_gradient(variant):
    """P74: dx = dy weight / sqrt(var + eps), no sample sees another; nothing moves."""
    layer = make(variant).double().train()
    constant = not uses_batch(layer)
    x = data(1).double().requires_grad_()
    dy = data(2).double()
    with nullcontext() if constant else normalization(layer, statistics="population"):
        before = state(layer)
        layer(x).backward(dy)
    assert same(state(layer), before)
    mean, var = (numpy(value) for value in layer.populations()[""])
    eps = layer.eps
    if variant[0] == "l1":
        var, eps = l1.as_variance(var, eps), 0.0
    expected = frozen.forward_backward(
        numpy(x), numpy(dy), mean, var, numpy(layer.weight), numpy(layer.bias), eps
    )
    _, dx, dweight, dbias = (torch.from_numpy(value) for value in expected)
    torch.testing.assert_close(x.grad, dx, rtol=1e-12, atol=1e-12)
    if layer.weight.requires_grad:
        torch.testing.assert_close(layer.weight.grad, dweight)
        torch.testing.assert_close(layer.bias.grad, dbias)


@pytest.mark.parametrize("variant", CHOOSING)
def test_an_estimate_leaves_every_layer_alone(variant):
    """P53: watching is not updating, whichever way a layer gets at its statistics."""
    layer = make(variant).train()
    for estimator in ("pooled", "mean", "cheap"):
        before = state(layer)
        estimate(layer, [data(1), data(2)], estimator=estimator)
        assert same(state(layer), before)
        assert layer.training


@pytest.mark.parametrize("variant", FAMILY)
def test_a_frozen_layer_stays_frozen(variant):
    """P12: three steps with train() in between leave statistics and counter bitwise equal."""
    layer = make(variant)
    layer.statistics = "population"
    buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for seed in range(3):
        layer.train()
        y = layer(data(seed).requires_grad_())
        y.square().sum().backward()
        optimizer.step()
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in layer.named_buffers())


@pytest.mark.parametrize("variant", CHOOSING)
def test_one_step_moves_the_population(variant):
    """P63: nothing waits to be called for the running statistics to follow."""
    layer = make(variant)
    before = state(layer)
    layer.train()(data(1))
    assert not torch.equal(layer.running_mean, before["running_mean"])
    assert not torch.equal(layer.running_var, before["running_var"])
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("variant", FAMILY)
def test_there_is_no_way_to_lose_the_buffers(variant):
    """P11: no track_running_stats; a population that is used has values, always."""
    layer = make(variant)
    assert not hasattr(layer, "track_running_stats")
    assert all(buffer is not None for buffer in layer._buffers.values())
    with pytest.raises(TypeError, match="track_running_stats"):
        type(layer)(6, track_running_stats=False, **arguments(variant))


@pytest.mark.parametrize("variant", FAMILY)
def test_decay_is_the_only_spelling(variant):
    """P2: a momentum copied from anywhere is refused, not taken for the other convention."""
    with pytest.raises(TypeError, match="momentum"):
        type(make(variant))(6, momentum=0.9, **arguments(variant))


@pytest.mark.parametrize("variant", FAMILY)
def test_no_batch_size_is_special_in_evaluation(variant):
    """P9, P10, P47: each row alone, in batches of one, of a prime number, and in any order."""
    layer = make(variant).eval()
    x = data(1, (11, *IMAGES[1:]))
    together = layer(x)
    for size in (1, 3, 7):
        parts = torch.cat([layer(part) for part in x.split(size)])
        torch.testing.assert_close(parts, together, rtol=1e-6, atol=1e-6)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x[order]), together[order], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", CHOOSING)
def test_a_layer_that_is_watched_and_does_not_update_learns_all_the_same(variant):
    gradients = []
    for observers in ([], [lambda _: None]):
        layer, x = make(variant), data(3).requires_grad_()
        layer.observers.extend(observers)
        with normalization(layer, update=False):
            layer(x).square().sum().backward()
        gradients.append(x.grad)
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-5)
