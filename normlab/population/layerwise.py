"""Population statistics layer by layer: each with all the layers before it at theirs."""

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from normlab.norms.base import PopulationNorm, normalization, population_layers
from normlab.population.accumulate import Pooled
from normlab.population.together import Together
from normlab.population.values import Population, Statistics, using

__all__ = ["check_layerwise", "layerwise"]

_Use = tuple[str, int]
"""A layer's name, and which of its uses within one forward."""


def check_layerwise(model: nn.Module) -> None:
    """Whether the layers of `model` can be measured one by one; frozen ones need not be.

    Raises ValueError, naming the layer, for one with several populations, and for one whose
    statistic is no mean and variance (`PopulationNorm.pools`).
    """
    for name, layer in population_layers(model).items():
        if layer.frozen:
            continue
        if not layer.pools:
            raise ValueError(
                f"layerwise: {name or 'the model'} is a {type(layer).__name__}, whose statistic "
                "does not follow from those of batches, whatever their size"
            )
        if "" not in layer.populations():
            raise ValueError(
                f"layerwise: {name or 'the model'} has several populations, which it cannot tell "
                "apart: estimate them with 'pooled', 'mean' or 'cheap'"
            )


class _Reached(BaseException):
    """Ends a forward at the layer that is being measured: no model is to catch it."""


def layerwise(
    model: nn.Module,
    layers: dict[str, PopulationNorm],
    batches: Iterable[Any],
    run: Callable[[nn.Module, Any], object],
    group_size: int | None,
    together: Together,
) -> Population:
    """Pooled statistics of `layers`, in the order in which a forward first reaches them.

    A pass over `batches` measures the input of one layer, with the layers before it normalizing by
    what was found for them, and no sample by another one of its batch: so the batch size cannot
    matter. A layer's second use in a forward is measured, and later normalized, apart from its
    first; its statistics pool all its uses. The measuring does not run the layer: any batch that is
    not empty will do. With `group_size`, its moments are taken over groups of as many samples and
    merged, which is the same up to rounding. Over ranks, each layer's statistics are merged before
    the next one is measured; a rank without batches takes part.

    Expects the model in eval mode, gradients off, what `check_layerwise` lets pass and batches that
    can be passed over again. Raises ValueError for none, for a batch that `group_size` does not
    divide, and if a batch reaches the layers in another order than the first did.
    """
    measured: dict[_Use, Pooled] = {}
    values: dict[_Use, Statistics] = {}
    with ExitStack() as restore:
        # The buffers take the values of each use in turn; `using` puts their own back at the end.
        own = {k: Statistics(v.running_mean, v.running_var, 0) for k, v in layers.items()}
        restore.enter_context(using(model, own))
        restore.enter_context(normalization(model, statistics="population", update=False))
        order = _order(model, layers, batches, run, together)
        shown = None if together.rank == 0 else True
        bar = restore.enter_context(
            tqdm(order, desc="statistics layer by layer", unit="layer", leave=False, disable=shown)
        )
        for use in bar:
            seen = measured[use] = Pooled(layers[use[0]].running_mean)
            with together.attempt() as made:
                last = use == order[-1]
                _measure(model, layers, batches, run, use, values, group_size, last, seen)
            together.merge([seen], [], made)
            result = seen.result()
            if result is None:
                raise ValueError(f"layerwise: {use[0]!r} saw empty batches only")
            values[use] = result
    pooled: dict[str, Pooled] = {}
    for (name, _), seen in measured.items():
        pooled.setdefault(name, Pooled(seen.mean)).merge(seen)
    results = {name: pooled[name].result() for name in layers if name in pooled}
    return {name: result for name, result in results.items() if result is not None}


def _order(
    model: nn.Module,
    layers: dict[str, PopulationNorm],
    batches: Iterable[Any],
    run: Callable[[nn.Module, Any], object],
    together: Together,
) -> list[_Use]:
    """The uses of the layers in a forward of the first batch, the same on all ranks."""
    names = list(layers)
    own: list[int] | None = None
    with together.attempt() as made:
        own = _reached(model, layers, batches, run)
    lengths = together.exchange([-1 if own is None else len(own)], made)[:, 0].int().tolist()
    some = [rank for rank, length in enumerate(lengths) if length >= 0]
    if not some:
        raise ValueError("population statistics need at least one batch; there was none")
    padding = [-1] * (max(lengths) - len(own or ()))
    orders = together.exchange([*(own or ()), *padding], made)[some].int()
    if (orders != orders[0]).any():
        raise ValueError(
            "layerwise: ranks reach the layers in different orders: every batch must reach them in "
            "the same one"
        )
    uses: Counter[int] = Counter()
    order = []
    for layer in orders[0].tolist():
        order.append((names[layer], uses[layer]))
        uses[layer] += 1
    return order


def _reached(
    model: nn.Module,
    layers: dict[str, PopulationNorm],
    batches: Iterable[Any],
    run: Callable[[nn.Module, Any], object],
) -> list[int] | None:
    """The numbers of the layers in the order of a forward of the first batch, None without one."""
    for batch in batches:
        order: list[int] = []
        with ExitStack() as hooks:
            for number, layer in enumerate(layers.values()):
                hook = partial(_append, order, number)
                hooks.callback(layer.register_forward_pre_hook(hook).remove)
            run(model, batch)
        return order
    return None


def _append(order: list[int], number: int, *_: Any) -> None:
    order.append(number)


def _measure(
    model: nn.Module,
    layers: dict[str, PopulationNorm],
    batches: Iterable[Any],
    run: Callable[[nn.Module, Any], object],
    wanted: _Use,
    values: dict[_Use, Statistics],
    group_size: int | None,
    last: bool,
    seen: Pooled,
) -> None:
    """Add to `seen` what the use `wanted` takes in; those before it normalize by `values`."""
    uses: Counter[str] = Counter()
    arrived = False

    def enter(name: str, layer: PopulationNorm, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal arrived
        use = (name, uses[name])
        uses[name] += 1
        if use in values:
            layer.running_mean.copy_(values[use].mean)
            layer.running_var.copy_(values[use].var)
        elif use == wanted:
            arrived = True
            _add(seen, args[0] if args else next(iter(kwargs.values())), group_size)
            if not last:
                raise _Reached
        else:
            raise ValueError(
                f"layerwise: a batch reached {name!r}, where the first did not: every batch "
                "must reach the layers in the same order"
            )

    with ExitStack() as hooks:
        for name, layer in layers.items():
            handle = layer.register_forward_pre_hook(partial(enter, name), with_kwargs=True)
            hooks.callback(handle.remove)
        for batch in batches:
            uses.clear()
            arrived = False
            try:
                run(model, batch)
            except _Reached:
                continue
            if not arrived:
                raise ValueError(
                    f"layerwise: a batch did not reach {wanted[0]!r}, as the first did: every "
                    "batch must reach the layers in the same order"
                )


def _add(seen: Pooled, x: Tensor, group_size: int | None) -> None:
    """Merge the input x (N, C, ...), its moments taken in float64 over groups of samples."""
    if x.numel() == 0:
        return
    size = len(x) if group_size is None else group_size
    if size < 1 or len(x) % size:
        raise ValueError(f"a batch of {len(x)} samples is not a multiple of group_size={size}")
    groups = x.unflatten(0, (-1, size))  # (G, N / G, C, ...)
    over = tuple(d for d in range(groups.dim()) if d not in (0, 2))
    mean = groups.mean(over, dtype=torch.float64, keepdim=True)
    var = (groups - mean).square_().mean(over)
    count = x.numel() // (var.size(0) * x.size(1))
    counts = var.new_full((var.size(0), 1), count)
    seen.add(mean.reshape(var.shape), var, counts, count * var.size(0))
