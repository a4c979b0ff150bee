"""The grid of one scale: axes of config keys, and the axis ``arm``, whose values are bundles.

Most grids are a product of keys. Where an arm needs several keys at once, or a key that another
arm does not have (a norm without an NBS), the axis ``arm`` lists named bundles of overrides. Tables
and claims do not speak of their names but of where they stand (``at``).
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from normlab.experiment.checks import items, mapping, refuse, text

AXIS = "arm"

_READ_OFF = ("nbs", "seed")
"""Axes of networks that are given: what is read off their runs."""


@dataclass(frozen=True)
class Arm:
    """A value of the axis ``arm``: its place in tables and claims, and what overrides make it."""

    at: dict[str, Any]
    set: dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One run of the grid: its values on the axes, its place, and the overrides that make it."""

    axes: dict[str, Any]
    at: dict[str, Any]
    overrides: list[str]


@dataclass(frozen=True)
class Scale:
    """The grid at one scale: fixed overrides, the swept axes (``seed`` among them), the arms."""

    set: dict[str, Any]
    axes: dict[str, list[Any]]
    arms: dict[str, Arm] = field(default_factory=dict)
    """The values of the axis ``arm``, in its order."""
    given: bool = False
    """Whether the networks are the user's (``init_from``): no cell is known before there are runs,
    and a seed draws the images that measure a network, not the network."""
    columns: str = ""
    """The scale whose columns these runs have, where it is another."""
    differs: str = ""
    """What differs from the paper's protocol here, where that is not what the file says of all."""

    @property
    def places(self) -> dict[str, list[Any]]:
        """What tables and claims name a cell by, with all values: an arm counts by its place."""
        found: dict[str, list[Any]] = {}
        for axis, values in self.axes.items():
            given = [arm.at for arm in self.arms.values()] if axis == AXIS else [
                {axis: value} for value in values
            ]  # fmt: skip
            for at in given:
                for key, value in at.items():
                    known = found.setdefault(key, [])
                    known += [] if value in known else [value]
        return found

    def cells(self, fixed: dict[str, Any]) -> Iterator[Cell]:
        """Every run, in the order in which a sweep starts them. `fixed`: the experiment's set."""
        for values in product(*self.axes.values()):
            axes = dict(zip(self.axes, values, strict=True))
            made = {**fixed, **self.set}
            at: dict[str, Any] = {}
            for axis, value in axes.items():
                if axis == AXIS:
                    made |= self.arms[value].set
                    at |= self.arms[value].at
                else:
                    made[axis] = value
                    at[axis] = value
            yield Cell(axes, at, [f"{key}={spelled(value)}" for key, value in made.items()])

    def on_axes(self, point: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
        """A place as the values of the axes that a sweep runs; of given networks, what is said of
        them besides is the user's, and the one arm goes without saying."""
        point = list(point)
        if self.given:
            return [(key, value) for key, value in point if key in self.axes]
        placed = {key: value for key, value in point if key not in self.axes}
        for name, arm in self.arms.items():
            if arm.at == placed:
                return [(AXIS, name), *((key, v) for key, v in point if key in self.axes)]
        return point


def spelled(value: Any) -> str:
    """A value as an override takes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def read_arms(where: str, value: Any) -> dict[str, Arm]:
    """The arms of a file: name -> {at, set}; without `at`, the name is the place."""
    arms = {}
    for name, given in mapping(where, value).items():
        if not re.fullmatch(r"[a-z][a-z0-9_-]*", name):
            refuse(where, f"'{name}' is no name of lower-case letters, digits, _ and -")
        raw = mapping(f"{where}.{name}", given, ("set",), ("at",))
        at = mapping(f"{where}.{name}.at", raw.get("at", {AXIS: name}))
        arms[name] = Arm(at, mapping(f"{where}.{name}.set", raw["set"]))
    return arms


def read_scale(where: str, value: Any, arms: dict[str, Arm]) -> Scale:
    """A scale of a file. Its own `arms` adds overrides to those of the file's arms."""
    raw = mapping(where, value, ("axes",), ("set", "arms", "given", "columns", "differs"))
    axes = mapping(f"{where}.axes", raw["axes"])
    for axis, values in axes.items():
        if not items(f"{where}.axes.{axis}", values):
            refuse(f"{where}.axes.{axis}", "has no values")
    if not all(type(seed) is int for seed in axes.get("seed", [None])):
        refuse(f"{where}.axes.seed", "must be a list of whole numbers")
    own = mapping(f"{where}.arms", raw.get("arms", {}))
    for name in (*own, *axes.get(AXIS, ())):
        if name not in arms:
            refuse(where, f"unknown arm '{name}' (arms: {', '.join(arms) or 'none'})")
    chosen = {}
    for name in axes.get(AXIS, ()):
        added = mapping(f"{where}.arms.{name}", own.get(name, {}))
        chosen[name] = Arm(arms[name].at, arms[name].set | added)
    for name, arm in chosen.items():
        if any(arm.at == other.at for key, other in chosen.items() if key != name):
            refuse(where, f"arm {name} stands where another does: {arm.at}")
        if taken := set(arm.at) & set(axes) - {AXIS}:
            refuse(where, f"arm {name} stands on axes of their own: {sorted(taken)}")
    given = raw.get("given", False)
    if not isinstance(given, bool):
        refuse(f"{where}.given", f"must be true or false, is {given!r}")
    if given and (len(chosen) > 1 or set(axes) - {AXIS, *_READ_OFF}):
        refuse(f"{where}.axes", f"networks that are given have one arm, and {', '.join(_READ_OFF)}")
    return Scale(
        mapping(f"{where}.set", raw.get("set", {})),
        axes,
        chosen,
        given,
        columns=text(f"{where}.columns", raw.get("columns", "")),
        differs=text(f"{where}.differs", raw.get("differs", "")),
    )
