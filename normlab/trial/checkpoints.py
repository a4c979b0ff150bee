"""Faults that are made of a finished training: of its buffers, or by a wrong operation on them."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from normlab.surgery import fold, fusible
from normlab.trial.case import Case
from normlab.trial.networks import norms
from normlab.trial.training import Trained, seeded, set_momentum

__all__ = [
    "OFFSETS", "averaged_over_all", "from_another_domain", "fused_but_kept", "healthy",
    "never_updated", "precise_of_few_digits", "saved_in_half",
    "tracking_off", "with_momentum", "without_momentum",
]  # fmt: skip

OFFSETS = [1e4 * 1.1**k for k in range(20)]
"""Of raw measurements with a standard deviation of about 1, such as pressures in pascal."""

RAW = 1e3
"""A standard deviation of raw measurements whose square is beyond half precision's 65504."""


def healthy(of: Trained) -> Case:
    """As it was trained: nothing is wrong."""
    return _case(of, of.model())


def with_momentum(of: Trained, momentum: float) -> Case:
    """The layers had this momentum in the training from scratch."""
    model = of.model()
    model.load_state_dict(of.state | of.buffers[str(momentum)])
    set_momentum(model, momentum)
    return _case(of, model)


def averaged_over_all(of: Trained) -> Case:
    """`momentum=None`: the statistics are the average over all steps, the first ones included."""
    model = of.model()
    model.load_state_dict(of.state | of.buffers["None"])
    set_momentum(model, None)
    return _case(of, model)


def without_momentum(of: Trained) -> Case:
    """`momentum=0`, taken for "off": every step counts and none moves the statistics."""
    model = of.model()
    for layer in norms(model).values():
        assert layer.num_batches_tracked is not None
        steps = layer.num_batches_tracked.clone()
        layer.reset_running_stats()
        layer.num_batches_tracked.copy_(steps)
    set_momentum(model, 0.0)
    return _case(of, model)


def never_updated(of: Trained) -> Case:
    """The code of the training normalized with batches and left the update out."""
    model = of.model()
    for layer in norms(model).values():
        layer.reset_running_stats()
    return _case(of, model)


def from_another_domain(of: Trained) -> Case:
    """An evaluation on fogged images was run in training mode, and the model saved after it."""
    model = of.model()
    with torch.no_grad(), seeded(of.seed):
        for _, (x, _) in zip(range(of.size.further), of.stream(of.material.fogged), strict=False):
            model(x)
    return _case(of, model)


def tracking_off(of: Trained) -> Case:
    """`track_running_stats` was switched off after the training, to get rid of the statistics."""
    model = of.model()
    for layer in norms(model).values():
        layer.track_running_stats = False
        layer.running_mean = layer.running_var = layer.num_batches_tracked = None
    return _case(of, model)


def fused_but_kept(of: Trained) -> Case:
    """Every norm was folded into its convolution for speed, and then applied once more."""
    model = of.model().eval()
    for pair in fusible(model):
        if not pair.obstacle:
            fold(model.get_submodule(pair.layer), model.get_submodule(pair.norm))
    return _case(of, model.train())


def precise_of_few_digits(of: Trained) -> Case:
    """A norm in front takes raw measurements; precise statistics are E[x^2] - E[x]^2 in float32.

    They are of the smallest of `OFFSETS` at which such a variance comes out below zero: before, it
    is wrong, too, or zero, as rounding has it.
    """
    channels = of.material.train[0].shape[1]
    front = nn.BatchNorm1d if of.network.signals else nn.BatchNorm2d
    data = front(channels, affine=False)
    for offset in OFFSETS:
        batches = [(x + offset, y) for x, y in of.shown()]
        variance_of_few_digits(data, [x for x, _ in batches])
        if (data.get_buffer("running_var") < 0).any():
            break
    test = [(x + offset, y) for x, y in of.test()]
    model = nn.Sequential(OrderedDict(data=data, net=of.model())).train()
    return Case(model, batches, test, of.optimizer, nbs=of.size.batch)


def saved_in_half(of: Trained) -> Case:
    """A norm in front takes raw measurements with deviations of `RAW`; `model.half()` was saved."""
    channels = of.material.train[0].shape[1]
    front = nn.BatchNorm1d if of.network.signals else nn.BatchNorm2d
    data = front(channels, affine=False, momentum=None)
    batches, test = ([(x * RAW, y) for x, y in part] for part in (of.shown(), of.test()))
    for x, _ in batches:
        data(x)
    model = nn.Sequential(OrderedDict(data=data, net=of.model())).train()
    model.load_state_dict(
        {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    )
    return Case(model, batches, test, of.optimizer, nbs=of.size.batch)


def variance_of_few_digits(layer: nn.Module, inputs: list[Tensor]) -> None:
    """Set its statistics from sums of x and x^2 over `inputs`, the estimator of many scripts."""
    sums = squares = torch.zeros(inputs[0].shape[1])
    count = 0
    for x in inputs:
        flat = x.transpose(0, 1).flatten(1)
        sums, squares = sums + flat.sum(1), squares + flat.square().sum(1)
        count += flat.shape[1]
    mean = sums / count
    layer.get_buffer("running_mean").copy_(mean)
    layer.get_buffer("running_var").copy_(squares / count - mean.square())


def _case(of: Trained, model: nn.Module) -> Case:
    return Case(model, of.shown(), of.test(), of.optimizer, nbs=of.size.batch)
