"""The signature of what a config chooses is the schema of its options.

A group's ``module`` (default: its ``name``) is what is chosen, its other keys are keyword arguments
of it; names and annotations are checked before a run writes anything.
"""

import inspect
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any

_LABELS = {"name", "module", "batch"}


def module(group: dict[str, Any]) -> str:
    """The name of what a group has chosen, in its room."""
    return str(group.get("module") or group["name"])


def parameters(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """What it can be called with, annotations as types."""
    return dict(inspect.signature(target, eval_str=True).parameters)


def options(
    room: str, group: dict[str, Any], target: Callable[..., Any], reserved: Iterable[str]
) -> dict[str, Any]:
    """The group's own keys, checked against the signature of what they are given to.

    reserved: parameters that are not the config's to give. An option that is null and that the
    target does not have is absent: so an experiment takes back what a scale says. Raises ValueError
    in one line for an unknown option and for a value of the wrong type.
    """
    taken = parameters(target)
    allowed = {name: taken[name].annotation for name in taken.keys() - set(reserved)}
    given = {key: value for key, value in group.items() if key not in _LABELS}
    given = {key: value for key, value in given.items() if key in allowed or value is not None}
    for key, value in given.items():
        if key not in allowed:
            raise ValueError(
                f"{room}.{key}: {room}={group['name']} has no such option "
                f"(it has {', '.join(sorted(allowed)) or 'none'})"
            )
        if not _fits(value, allowed[key]):
            raise ValueError(
                f"{room}.{key}={value!r}: {room}={group['name']} wants {_spelled(allowed[key])}"
            )
    return given


def _fits(value: Any, hint: Any) -> bool:
    """Whether a config's value suits an annotation; an int is a float, a bool is no number."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in (Any, inspect.Parameter.empty):
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin in (list, tuple):
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if hint in (None, type(None)):
        return value is None
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _spelled(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_spelled(argument) for argument in typing.get_args(hint))
    return "null" if hint in (None, type(None)) else getattr(hint, "__name__", str(hint))
