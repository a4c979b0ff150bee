"""A trace of a model's forward by torch.fx that leaves the model as it was."""

import inspect
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

__all__ = ["Trace", "trace"]

_CONTAINERS = (dict, list, set, deque)
_CALLED = ("_backward_hooks", "_backward_pre_hooks", "_forward_hooks", "_forward_pre_hooks")


@dataclass(frozen=True)
class Trace:
    """What a forward does, and what the graph of it does not show.

    kept: the values that the forward left on the model, in its attributes and in the dictionaries,
    lists and sets there. hooked: the names of the modules whose forward was traced without the
    hooks that they have.
    """

    graph: fx.Graph
    kept: frozenset[fx.Node]
    hooked: tuple[str, ...]


def trace(model: nn.Module, opened: set[nn.Module]) -> Trace:
    """Trace the forward of `model` in its mode, with default arguments, into the modules `opened`.

    Hooks do not run. Attributes of the modules, what their containers hold, their tensors and
    torch's random numbers on the CPU are afterwards what they were. Raises what the trace raises.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    names = [name for name, module in model.named_modules() if module in opened and name]
    hooked = tuple(
        name for name in names if any(vars(model.get_submodule(name))[hooks] for hooks in _CALLED)
    )
    with _restored(model), torch.random.fork_rng(devices=[]):
        for module in opened:
            vars(module).update({hooks: OrderedDict() for hooks in _CALLED})
        graph = _Tracer(opened).trace(model, defaults)
        kept = frozenset(
            value.node
            for value in _values(vars(module) for module in model.modules())
            if isinstance(value, fx.Proxy)
        )
    return Trace(graph, kept, hooked)


class _Tracer(fx.Tracer):
    """Goes into the modules that hold norms, and takes all others as they are."""

    def __init__(self, opened: set[nn.Module]) -> None:
        super().__init__()
        self.opened = opened

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        del module_qualified_name
        return m not in self.opened


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    values = list(_values(vars(module) for module in model.modules()))
    containers = [
        (value, list(value.items() if isinstance(value, dict) else value))
        for value in values
        if isinstance(value, _CONTAINERS)
    ]
    # A Parameter that the forward reads is a proxy there, and other tensors are themselves.
    plain = [v for v in values if isinstance(v, Tensor) and not isinstance(v, nn.Parameter)]
    tensors = [(value, value._version, value.detach().clone()) for value in plain]
    try:
        yield
    finally:
        for container, held in containers:
            container.clear()
            (container.extend if isinstance(container, (list, deque)) else container.update)(held)
        with torch.no_grad():
            for value, version, was in tensors:
                if value._version != version:
                    value.copy_(was)


def _values(roots: Iterable[Any]) -> Iterator[Any]:
    """The values in nested containers, and these themselves, each once."""
    left, seen = list(roots), set[int]()
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        if isinstance(value, dict):
            left += value.values()
        elif isinstance(value, (list, set, deque, tuple, frozenset)):
            left += value
