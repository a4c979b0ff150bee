"""What a paper claims, as one file: ``experiments/<name>.yaml`` read into plain objects.

The sweep, the evaluation and the report all read the same file, so that none can ask for something
the others do not know. Nothing here imports torch.
"""

import hashlib
import json
import shlex
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from yaml import YAMLError

from normlab import plugins, protocols
from normlab.experiment import claim
from normlab.experiment.cells import AXIS, Arm, Cell, Scale, read_arms, read_scale, spelled
from normlab.experiment.checks import items, mapping, named, number, refuse, text
from normlab.experiment.claim import Claim, Contrast

__all__ = [
    "AXIS", "Arm", "Cell", "Claim", "Contrast", "Experiment", "Protocol", "Published", "Scale",
    "arms", "files", "load", "names", "overlay", "spelled",
]  # fmt: skip

GROUPS = ("model", "norm", "conv", "data", "recipe", "task")
"""The groups of ``conf/`` whose value in ``set`` or ``axes`` is an option's name."""

_KEYS = (
    "title", "source", "set", "scales", "protocols", "baseline", "table", "figure", "published",
    "claims",
)  # fmt: skip

FIGURES = Path(__file__).parent.parent / "report" / "figures"
"""The kinds of figure, a module each: looked up by name, since importing one takes a second."""


@dataclass(frozen=True)
class Protocol:
    """One evaluation of every run: its spec (see ``normlab.protocols``) and its column's label."""

    eval: str
    label: str


@dataclass(frozen=True)
class Published:
    """Numbers of a source: error in % by protocol, then by the value of the axis ``x``.

    ``at``: what else a cell must be for the numbers to speak of it.
    """

    label: str
    x: str
    values: dict[str, dict[Any, float]]
    at: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """One ``experiments/<name>.yaml``."""

    name: str
    title: str
    source: str
    set: dict[str, Any]
    scales: dict[str, Scale]
    protocols: dict[str, Protocol]
    baseline: dict[str, Any]
    table: dict[str, Any]
    figure: dict[str, Any]
    published: list[Published]
    claims: dict[str, Claim]
    judging: dict[str, Any] = field(repr=False)
    """What the file says of claims, protocols and fixed overrides, for ``claims_digest``."""

    def claims_digest(self, scale: str) -> str:
        """8 hex digits over all that judges at a scale: claims, protocols and the scale's grid.

        Runs record it, so that a claim edited after its runs is seen.
        """
        grid = self.scale(scale)
        judging = [self.judging, grid.set, grid.axes]
        judging += [{name: [arm.at, arm.set] for name, arm in grid.arms.items()}] * bool(grid.arms)
        text = json.dumps(judging, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def scale(self, name: str) -> Scale:
        """The grid at a scale. Raises ValueError naming the scales this experiment has."""
        if name not in self.scales:
            raise ValueError(
                f"experiment {self.name} has no scale '{name}' (it has {', '.join(self.scales)})"
            )
        return self.scales[name]

    def cells(self, scale: str) -> list[Cell]:
        """Every run of the grid, in the order in which a sweep starts them."""
        fixed = {"scale": scale, **self.set}
        return list(self.scale(scale).cells(fixed))

    def arms(self, scale: str) -> dict[str, dict[str, Any]]:
        """What makes each arm of a scale, the fixed overrides included: arm -> key -> value."""
        grid = self.scale(scale)
        return {name: {**self.set, **grid.set, **arm.set} for name, arm in grid.arms.items()}

    def evals(self) -> list[str]:
        """The evaluation specs that every run of this experiment needs."""
        return [protocol.eval for protocol in self.protocols.values()]

    def command(
        self, scale: str, point: Iterable[tuple[str, Any]] = (), seeds: Sequence[int] = ()
    ) -> str:
        """The command that fills missing cells at a scale: all, or those of a point and seeds.

        A value on the command line takes the place of the axis that the sweep would run.
        """
        words = ["normlab", "sweep", self.name, f"scale={scale}"]
        words += [f"{axis}={spelled(value)}" for axis, value in self.scale(scale).on_axes(point)]
        if seeds and list(seeds) != self.scale(scale).axes.get("seed"):
            words.append("seed=" + ",".join(map(str, seeds)))
        return shlex.join(words)


def files() -> dict[str, Path]:
    """Experiment name -> file: the project's own and those of installed packages."""
    found: dict[str, Path] = {}
    for directory in plugins.experiment_dirs():
        for path in sorted(directory.glob("*.yaml")):
            found.setdefault(
                path.stem, path
            )  # ours come first, and nothing installed replaces them
    return found


def names() -> list[str]:
    """The experiments there are."""
    return sorted(files())


@cache
def load(name: str) -> Experiment:
    """Read ``experiments/<name>.yaml``.

    Raises ValueError in one line for an unknown name and, by file and key, for what is wrong in it.
    """
    known = files()
    if name not in known:
        raise ValueError(f"no experiment '{name}' (experiments: {', '.join(sorted(known))})")
    where = f"experiments/{name}.yaml"
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(known[name]), resolve=True)
    except (YAMLError, OSError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        refuse(where, reason + (f", line {mark.line + 1}" if mark else ""))
    raw = mapping(where, loaded, _KEYS, ("arms",))
    named_arms = read_arms(f"{where}, arms", raw.get("arms", {}))
    scales = {
        scale: read_scale(f"{where}, scales.{scale}", value, named_arms)
        for scale, value in mapping(f"{where}, scales", raw["scales"]).items()
    }
    evals = {
        key: _protocol(f"{where}, protocols.{key}", value)
        for key, value in mapping(f"{where}, protocols", raw["protocols"]).items()
    }
    axes: dict[str, list[Any]] = {}
    for grid in scales.values():
        for axis, values in grid.places.items():
            axes.setdefault(axis, []).extend(values)
    _baseline(f"{where}, baseline", raw["baseline"], scales)
    mapping(f"{where}, table", raw["table"], {"columns"})
    named(f"{where}, table.columns", raw["table"]["columns"], evals)
    _figure(f"{where}, figure", raw["figure"], scales, evals)
    return Experiment(
        name=name,
        title=text(f"{where}, title", raw["title"]),
        source=text(f"{where}, source", raw["source"]),
        set=mapping(f"{where}, set", raw["set"]),
        scales=scales,
        protocols=evals,
        baseline=raw["baseline"],
        table=raw["table"],
        figure=raw["figure"],
        published=[
            _published(f"{where}, published[{i}]", value, evals)
            for i, value in enumerate(items(f"{where}, published", raw["published"]))
        ],
        claims={
            key: claim.read(f"{where}, claims.{key}", key, value, evals, axes)
            for key, value in mapping(f"{where}, claims", raw["claims"]).items()
        },
        judging={key: raw[key] for key in ("claims", "protocols", "set")},
    )


def _protocol(where: str, value: Any) -> Protocol:
    raw = mapping(where, value, ("eval", "label"))
    try:
        protocols.Protocol.parse(text(f"{where}.eval", raw["eval"]))
    except ValueError as error:
        refuse(where, str(error))
    return Protocol(raw["eval"], text(f"{where}.label", raw["label"]))


def _baseline(where: str, value: Any, scales: dict[str, Scale]) -> None:
    for axis, at in mapping(where, value).items():
        for scale, grid in scales.items():
            if at not in (values := grid.places.get(axis, [])):
                runs = ",".join(map(str, values)) or "nothing"
                refuse(where, f"scale {scale} does not run {axis}={at} (it runs {axis}={runs})")


def _figure(where: str, value: Any, scales: dict[str, Scale], known: Collection[str]) -> None:
    raw = mapping(where, value, ("kind", "x", "xlabel", "series"), optional=None)
    kinds = sorted(path.stem for path in FIGURES.glob("[!_]*.py"))
    if raw["kind"] not in kinds:
        refuse(f"{where}.kind", f"no figure kind '{raw['kind']}' (kinds: {', '.join(kinds)})")
    for axis in _listed(raw["x"]):
        for scale, grid in scales.items():
            if axis not in (*grid.places, "epoch"):
                refuse(f"{where}.x", f"'{axis}' is no axis of scale {scale}")
    somewhere = {axis for grid in scales.values() for axis in grid.places}
    for key in ("by", "only"):  # arms of one scale may be told apart by what others lack
        for axis in _listed(raw.get(key, [])):
            if axis not in somewhere:
                refuse(f"{where}.{key}", f"'{axis}' is an axis of no scale")
    for label in raw["xlabel"] if isinstance(raw["xlabel"], list) else [raw["xlabel"]]:
        text(f"{where}.xlabel", label)
    named(f"{where}.series", raw["series"], known)


def _listed(value: Any) -> list[str]:
    """An axis, a list of them or a mapping from them, as a list."""
    return [value] if isinstance(value, str) else list(value)


def _published(where: str, value: Any, known: Collection[str]) -> Published:
    raw = mapping(where, value, ("label", "x", "values"), ("at",))
    values = mapping(f"{where}.values", raw["values"])
    named(f"{where}.values", list(values), known)
    for protocol, numbers in values.items():
        for at, error in numbers.items() if isinstance(numbers, dict) else [("", numbers)]:
            number(f"{where}.values.{protocol}.{at}", error)
    return Published(
        label=text(f"{where}.label", raw["label"]),
        x=text(f"{where}.x", raw["x"]),
        values=values,
        at=mapping(f"{where}.at", raw.get("at", {})),
    )


def overlay(name: str, scale: str) -> dict[str, Any]:
    """The Hydra node behind ``experiment=<name>``: overrides, evaluations, the sweep of a scale.

    The axes depend on the scale, so the command line says which one before Hydra composes.
    """
    experiment = load(name)
    grid = experiment.scale(scale)
    # Hydra lets the first of two overrides of a group count: the arms bring what is fixed along.
    fixed = {} if grid.arms else {**experiment.set, **grid.set}
    defaults, node = _node(fixed)
    if grid.arms:
        defaults = [{f"/{AXIS}": next(iter(grid.arms))}]
    params = {key: ",".join(map(spelled, values)) for key, values in grid.axes.items()}
    node |= {
        "experiment": name,
        "evals": experiment.evals(),
        "hydra": {"mode": "MULTIRUN", "sweeper": {"params": params}},
    }
    return {"defaults": ["_self_", *defaults], **node}


def arms(name: str, scale: str) -> dict[str, dict[str, Any]]:
    """The Hydra nodes behind ``arm=<name>`` of an experiment at a scale."""
    nodes = {}
    for key, overrides in load(name).arms(scale).items():
        defaults, node = _node(overrides)
        nodes[key] = {"defaults": ["_self_", *defaults], **node}
    return nodes


def _node(overrides: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Overrides as a defaults list and the nested values of a Hydra node."""
    defaults: list[Any] = []
    node: dict[str, Any] = {}
    for key, value in overrides.items():
        if key in GROUPS:
            defaults.append({f"override /{key}": value})
            continue
        *parents, last = key.split(".")
        inner = node
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    return defaults, node
