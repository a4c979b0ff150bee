"""Each fault of a checkpoint is what it says: against trainings and sums that do it plainly."""

from itertools import islice

import pytest
import torch
from torch import nn

from normlab.trial import checkpoints
from normlab.trial.material import stream
from normlab.trial.networks import norms
from normlab.trial.training import MOMENTA, Trained, careful, set_momentum, train


def same_parameters(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


def directly(tiny: Trained, momentum: float | None) -> nn.Module:
    """Trained from scratch with layers of this momentum."""
    model = tiny.network.build(tiny.material.classes, tiny.seed)
    set_momentum(model, momentum)
    batches = stream(tiny.material.train, tiny.size.batch, tiny.seed)
    train(model, careful(model), batches, tiny.size.steps)
    return model


def test_the_healthy_network_has_learnt(tiny: Trained) -> None:
    model = checkpoints.healthy(tiny).model.eval()
    x, y = tiny.material.test
    assert (model(x).argmax(1) == y).float().mean() > 0.5


@pytest.mark.parametrize("momentum", MOMENTA.values())
def test_buffers_of_a_momentum_are_those_of_a_training_with_it(
    tiny: Trained, momentum: float | None
) -> None:
    case = (
        checkpoints.averaged_over_all(tiny)
        if momentum is None
        else checkpoints.with_momentum(tiny, momentum)
    )
    direct = directly(tiny, momentum)
    assert same_parameters(case.model, direct)
    for name, layer in norms(case.model).items():
        assert layer.momentum == momentum
        for key, value in direct.get_submodule(name).named_buffers():
            torch.testing.assert_close(layer.get_buffer(key), value, rtol=1e-5, atol=1e-6)


def test_without_momentum_every_step_counts_and_none_moves(tiny: Trained) -> None:
    case, direct = checkpoints.without_momentum(tiny), directly(tiny, 0.0)
    assert all(layer.momentum == 0 for layer in norms(case.model).values())
    for key, value in direct.state_dict().items():
        torch.testing.assert_close(case.model.state_dict()[key], value, rtol=0, atol=0)


def test_never_updated_is_as_at_the_start(tiny: Trained) -> None:
    case = checkpoints.never_updated(tiny)
    assert same_parameters(case.model, tiny.model())
    for layer in norms(case.model).values():
        assert layer.num_batches_tracked == 0
        assert (layer.running_mean == 0).all()
        assert (layer.running_var == 1).all()


def test_statistics_of_another_domain_are_an_average_over_it(tiny: Trained) -> None:
    model = checkpoints.from_another_domain(tiny).model
    assert same_parameters(model, tiny.model())
    expected = tiny.state["norm.running_mean"].double()
    for x, _ in islice(tiny.stream(tiny.material.fogged), tiny.size.further):
        mean = nn.functional.conv2d(x.double(), tiny.state["stem.weight"].double(), padding=1)
        expected = 0.9 * expected + 0.1 * mean.mean((0, 2, 3))
    torch.testing.assert_close(
        model.get_buffer("norm.running_mean").double(), expected, rtol=1e-4, atol=1e-5
    )


def test_without_tracking_an_output_depends_on_its_batch(tiny: Trained) -> None:
    model = checkpoints.tracking_off(tiny).model.eval()
    x = tiny.material.test[0]
    assert not torch.allclose(model(x)[:4], model(x[:4]), atol=1e-3)
    healthy = tiny.model().eval()
    assert torch.allclose(healthy(x)[:4], healthy(x[:4]), atol=1e-5)


def test_fused_but_kept_is_the_healthy_function_without_its_norms(tiny: Trained) -> None:
    model, healthy, x = (
        checkpoints.fused_but_kept(tiny).model.eval(),
        tiny.model().eval(),
        tiny.material.test[0],
    )
    assert not torch.allclose(model(x), healthy(x), atol=1e-2)
    for name in norms(model):
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, nn.Identity())
    torch.testing.assert_close(model(x), healthy(x), rtol=1e-4, atol=1e-4)


def test_few_digits_make_a_variance_negative(tiny: Trained) -> None:
    case = checkpoints.precise_of_few_digits(tiny)
    data = case.model.get_submodule("data")
    assert data.get_buffer("running_var").min() < 0
    x = torch.cat([x for x, _ in case.batches]).double()
    assert (x.var((0, 2, 3)) > 0.5).all()
    mean = data.get_buffer("running_mean").double()
    torch.testing.assert_close(mean, x.mean((0, 2, 3)), rtol=1e-5, atol=0)


def test_half_precision_has_no_such_variance(tiny: Trained) -> None:
    case = checkpoints.saved_in_half(tiny)
    assert case.model.get_buffer("data.running_var").isinf().all()
    x = torch.cat([x for x, _ in case.batches]).double()
    mean = case.model.get_buffer("data.running_mean").double()
    torch.testing.assert_close(mean, x.mean((0, 2, 3)), rtol=1e-3, atol=0.1)
    torch.testing.assert_close(
        case.model.get_parameter("net.stem.weight"), tiny.state["stem.weight"], rtol=1e-3, atol=1e-4
    )
