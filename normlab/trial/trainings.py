"""Faults that happen in training: the healthy network is trained further, or another one anew."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import normlab
from normlab.trial.case import Case
from normlab.trial.material import Labelled
from normlab.trial.networks import norms
from normlab.trial.training import Trained, careful, optimizer_of, seeded, set_momentum, train

__all__ = [
    "averaged_weights", "biased_variance", "decayed_norms", "eps_lost",
    "frozen_backbone", "ranks_apart", "recomputed", "shared_norms", "two_domains",
]  # fmt: skip

LR = 1e-3
"""Peak learning rate of a training that goes on."""

SWA_LR = 3e-3
"""The constant one between the points of an average: high, as it is meant to be."""

SMALL = 0.01
"""Standard deviation of all weights at the start, where variances are to be as small as an eps."""

KERAS_EPS, TORCH_EPS = 1e-3, 1e-5


def averaged_weights(of: Trained) -> Case:
    """SWA of three points of a training at a constant rate, with the buffers of the last one."""
    model = of.model()
    optimizer, batches = careful(model, SWA_LR), of.stream()
    points = []
    with seeded(of.seed):
        for _ in range(3):
            train(model, optimizer, batches, of.size.further, constant=True)
            points.append([p.detach().clone() for p in model.parameters()])
    with torch.no_grad():
        for p, values in zip(model.parameters(), zip(*points, strict=True), strict=True):
            p.copy_(torch.stack(values).mean(0))
    return _case(of, model, optimizer)


def recomputed(of: Trained) -> Case:
    """Trained anew with activation checkpointing: its blocks ran forward twice in every step."""
    model = of.network.build(of.material.classes, of.seed)
    set_momentum(model, 0.1)
    for name in of.network.blocks:
        block = model.get_submodule(name)
        block.forward = _twice(block.forward)
    optimizer = careful(model, 2 * LR)
    with seeded(of.seed):
        train(model, optimizer, of.stream(), 2 * of.size.further)
    for name in of.network.blocks:
        del model.get_submodule(name).forward
    return _case(of, model, optimizer)


def _twice(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        y: Tensor = checkpoint(forward, x, use_reentrant=False)
        return y

    return run


def frozen_backbone(of: Trained) -> Case:
    """Only the last layer learns, on fogged images; `requires_grad = False` for all others, and
    `model.train()` every epoch."""
    model = of.model()
    *backbone, _ = (m for m in model.modules() if list(m.parameters(recurse=False)))
    for module in backbone:
        for p in module.parameters(recurse=False):
            p.requires_grad = False
    fogged = of.material.fogged
    optimizer = careful(model, LR)
    with seeded(of.seed):
        train(model, optimizer, of.stream(fogged), of.size.further)
    return Case(model, of.shown(fogged), of.test(), optimizer.state_dict(), nbs=of.size.batch)


def biased_variance(of: Trained) -> Case:
    """Trained further with two images a device, where a framework keeps the biased variance."""
    model = normlab.convert(of.model(), "ghost", nbs=2)
    optimizer = careful(model, LR / 4)
    elements: dict[str, int] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(_count(elements, name))
        for name in norms(of.model())
    ]
    with seeded(of.seed):
        train(model, optimizer, of.stream(size=16), 2 * of.size.further)
    for handle in handles:
        handle.remove()
    model = normlab.revert(model)
    for name, layer in norms(model).items():
        n = elements[name]
        assert layer.running_var is not None
        layer.running_var *= (n - 1) / n  # an average of v (n - 1) / n is the average's (n - 1) / n
    return _case(of, model, optimizer, nbs=2)


def _count(elements: dict[str, int], name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
    def hook(_: nn.Module, inputs: tuple[Tensor]) -> None:
        elements[name] = 2 * inputs[0][0, 0].numel()

    return hook


def ranks_apart(of: Trained) -> Case:
    """Two ranks with a shard of a sorted list each; gradients are averaged, buffers are not, and
    rank 0 saves."""
    model = of.model()
    x, y = of.material.train
    low = y < of.material.classes / 2
    shards = [of.stream((x[part], y[part]), of.size.batch // 2) for part in (low, ~low)]
    start = _buffers(model)
    states = [{key: value.clone() for key, value in start.items()} for _ in shards]
    optimizer = careful(model, LR)

    def in_turn() -> Iterator[Labelled]:
        """Before each rank's forward the buffers become its own, after it they are kept."""
        while True:
            for own, shard in zip(states, shards, strict=True):
                model.load_state_dict(own, strict=False)
                yield next(shard)
                own.update({key: value.clone() for key, value in _buffers(model).items()})

    turns = in_turn()
    with seeded(of.seed):
        train(model, optimizer, turns, of.size.further, micro=len(shards))
    next(turns)  # keeps the last rank's
    whole = [model.state_dict() | own for own in states]
    whole = [{key: value.clone() for key, value in state.items()} for state in whole]
    model.load_state_dict(whole[0])
    case = _case(of, model, optimizer, nbs=of.size.batch // 2)
    return Case(case.model, case.batches, case.test, case.optimizer, whole, case.nbs)


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_buffers())


def eps_lost(of: Trained) -> Case:
    """Trained anew with Keras' eps from weights as small as in old recipes; read into layers with
    torch's."""
    model = of.network.build(of.material.classes, of.seed)
    set_momentum(model, 0.1)
    draw = torch.Generator().manual_seed(of.seed)
    for layer in model.modules():
        if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
            nn.init.normal_(layer.weight, std=SMALL, generator=draw)
    _set_eps(model, KERAS_EPS)
    optimizer = careful(model, 2 * LR)
    with seeded(of.seed):
        train(model, optimizer, of.stream(), of.size.steps)
    _set_eps(model, TORCH_EPS)
    return _case(of, model, optimizer)


def _set_eps(model: nn.Module, eps: float) -> None:
    for layer in norms(model).values():
        layer.eps = eps


def decayed_norms(of: Trained) -> Case:
    """Trained further with `AdamW(model.parameters(), weight_decay=...)`."""
    model = of.model()
    optimizer = optimizer_of([{"params": list(model.parameters()), "weight_decay": 0.05}], LR)
    with seeded(of.seed):
        train(model, optimizer, of.stream(), of.size.further)
    return _case(of, model, optimizer)


def two_domains(of: Trained) -> Case:
    """Trained further on batches of images and of fogged ones in turn: one set of statistics."""
    model = of.model()
    optimizer = careful(model, LR)
    fogged = of.material.fogged

    def in_turn() -> Iterator[Labelled]:
        streams = of.stream(), of.stream(fogged)
        while True:
            yield from map(next, streams)

    with seeded(of.seed):
        train(model, optimizer, in_turn(), 2 * of.size.further)
    shown = [batch for pair in zip(of.shown(), of.shown(fogged), strict=True) for batch in pair]
    half = shown[: len(of.shown())]
    return Case(model, half, of.test(), optimizer.state_dict(), nbs=of.size.batch)


def shared_norms(of: Trained) -> Case:
    """Trained further with one batch norm in two places, for every two in a row of one width."""
    model = of.model()
    free = list(norms(model).items())
    pairs = []
    while len(free) > 1:
        (_, one), (name, two) = free[:2]
        same = one.num_features == two.num_features
        pairs += [(one, name)] * same
        free = free[1 + same :]
    for one, name in pairs:
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, one)
    optimizer = careful(model, LR)
    with seeded(of.seed):
        train(model, optimizer, of.stream(), of.size.further)
    return _case(of, model, optimizer)


def _case(
    of: Trained, model: nn.Module, optimizer: torch.optim.Optimizer, nbs: int | None = None
) -> Case:
    return Case(model, of.shown(), of.test(), optimizer.state_dict(), nbs=nbs or of.size.batch)
