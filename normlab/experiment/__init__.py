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

from normlab import plugins
from normlab.experiment import claim, entry, figure
from normlab.experiment.cells import AXIS, Arm, Cell, Scale, read_arms, read_scale, spelled
from normlab.experiment.checks import items, mapping, named, number, refuse, text
from normlab.experiment.claim import EPOCH, FIRST, LAST, Claim, Contrast, Fact
from normlab.experiment.entry import OVER, PERCENT, Protocol

__all__ = [
    "AXIS", "COLUMN", "EPOCH", "FIRST", "LAST", "OVER", "PERCENT", "Arm", "Cell", "Claim",
    "Contrast", "Experiment", "Fact", "Protocol", "Published", "Scale", "arms", "files", "load",
    "names", "overlay", "spelled",
]  # fmt: skip

GROUPS = ("model", "norm", "conv", "data", "recipe", "task")
"""The groups of ``conf/`` whose value in ``set`` or ``axes`` is an option's name."""

_KEYS = (
    "title", "source", "set", "scales", "protocols", "baseline", "table", "figure", "published",
    "claims",
)  # fmt: skip

COLUMN = "column"
"""What `baseline` may name besides axes: protocols, one for each unit, whose numbers at the same
place are the base."""


@dataclass(frozen=True)
class Published:
    """Numbers of a source in their protocol's unit: by protocol, then by the value of axis ``x``.

    ``at``: what else a cell must be for the numbers to speak of it; an epoch, where the table has
    several.
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
    facts: dict[str, Fact]
    """Identities and closed forms: listed apart, and no claims."""
    differs: str
    """How this differs from the paper's protocol at scales that do not say so themselves."""
    judging: dict[str, Any] = field(repr=False)
    """What the file says of claims, facts, protocols and fixed overrides, for ``claims_digest``."""

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

    def columns(self, scale: str) -> dict[str, Protocol]:
        """The protocols that a scale has, which are nearly always all."""
        like = self.scale(scale).columns or scale
        return {key: one for key, one in self.protocols.items() if one.measured_at(like)}

    def evals(self, scale: str) -> list[str]:
        """The evaluation specs that every run of a scale needs, each draw of each once."""
        wanted = (one.specs for one in self.columns(scale).values() if one.column != "value")
        return list(dict.fromkeys(spec for specs in wanted for spec in specs))

    def probes(self, scale: str) -> list[str]:
        """The probes that every run of a scale needs (a task's own numbers need none)."""
        return list(dict.fromkeys(one.probe for one in self.columns(scale).values() if one.probe))

    def differs_at(self, scale: str) -> str:
        """What differs from the paper's protocol at a scale, in one line; "" if nobody has said."""
        return self.scales[scale].differs or self.differs

    def base(self, protocol: str) -> str | None:
        """The column whose number at the baseline a column is compared with: mostly its own.

        Where the baseline names columns, the one of the same unit; None if none is.
        """
        if COLUMN not in self.baseline:
            return protocol
        unit = self.protocols[protocol].unit
        named_ones = _listed(self.baseline[COLUMN])
        return next((key for key in named_ones if self.protocols[key].unit == unit), None)

    def command(
        self, scale: str, point: Iterable[tuple[str, Any]] = (), seeds: Sequence[int] = ()
    ) -> str:
        """The command that fills missing cells at a scale: all, or those of a point and seeds.

        A value on the command line takes the place of the axis that the sweep would run.
        """
        words = ["normlab", "sweep", self.name, f"scale={scale}"]
        grid = self.scale(scale)
        words += ["init_from=weights.pth"] * grid.given
        words += [f"{axis}={spelled(value)}" for axis, value in grid.on_axes(point)]
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
    raw = mapping(where, loaded, _KEYS, ("arms", "facts", "differs"))
    named_arms = read_arms(f"{where}, arms", raw.get("arms", {}))
    scales = {
        scale: read_scale(f"{where}, scales.{scale}", value, named_arms)
        for scale, value in mapping(f"{where}, scales", raw["scales"]).items()
    }
    for scale, grid in scales.items():
        if grid.columns not in ("", *scales):
            known_ones = ", ".join(scales)
            refuse(f"{where}, scales.{scale}.columns", f"'{grid.columns}' is none of {known_ones}")
    tasks = _tasks(mapping(f"{where}, set", raw["set"]), scales)
    columns = {
        key: entry.read(f"{where}, protocols.{key}", value, tasks, scales)
        for key, value in mapping(f"{where}, protocols", raw["protocols"]).items()
    }
    units = {key: column.difference_unit for key, column in columns.items()}
    axes: dict[str, list[Any]] = {}
    for grid in scales.values():
        for axis, values in grid.places.items():
            axes.setdefault(axis, []).extend(values)
    _baseline(f"{where}, baseline", raw["baseline"], scales, columns)
    mapping(f"{where}, table", raw["table"], ("columns",), ("epochs",))
    named(f"{where}, table.columns", raw["table"]["columns"], columns)
    for at in items(f"{where}, table.epochs", raw["table"].get("epochs", [])):
        claim.epoch(f"{where}, table.epochs", at)
    told = [EPOCH] if raw["table"].get("epochs") else []
    figure.read(f"{where}, figure", raw["figure"], scales, columns, told)
    return Experiment(
        name=name,
        title=text(f"{where}, title", raw["title"]),
        source=text(f"{where}, source", raw["source"]),
        set=raw["set"],
        scales=scales,
        protocols=columns,
        baseline=raw["baseline"],
        table=raw["table"],
        figure=raw["figure"],
        published=[
            _published(f"{where}, published[{i}]", value, columns)
            for i, value in enumerate(items(f"{where}, published", raw["published"]))
        ],
        claims={
            key: claim.read(f"{where}, claims.{key}", key, value, units, axes, scales)
            for key, value in mapping(f"{where}, claims", raw["claims"]).items()
        },
        facts={
            key: claim.read_fact(f"{where}, facts.{key}", key, value, units, axes)
            for key, value in mapping(f"{where}, facts", raw.get("facts", {})).items()
        },
        differs=text(f"{where}, differs", raw.get("differs", "")),
        judging=_judging(raw),
    )


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _judging(raw: dict[str, Any]) -> dict[str, Any]:
    """What judges, of a whole file: a follow-up is named after the runs, and judges nothing."""
    claims = {
        name: {key: value for key, value in of.items() if key != "followup"}
        for name, of in raw["claims"].items()
    }
    judging = {"claims": claims, "protocols": raw["protocols"], "set": raw["set"]}
    return judging | ({"facts": raw["facts"]} if raw.get("facts") else {})


def _tasks(fixed: dict[str, Any], scales: dict[str, Scale]) -> set[str]:
    """The tasks that the runs of an experiment are, as far as they are named."""
    sets = [fixed, *(grid.set for grid in scales.values())]
    sets += [arm.set for grid in scales.values() for arm in grid.arms.values()]
    named_ones = {str(one["task"]) for one in sets if "task" in one}
    return named_ones.union(*(map(str, grid.axes.get("task", ())) for grid in scales.values()))


def _baseline(
    where: str, value: Any, scales: dict[str, Scale], columns: dict[str, Protocol]
) -> None:
    for axis, at in mapping(where, value).items():
        if axis == COLUMN:
            named(where, _listed(at), columns)
            continue
        for scale, grid in scales.items():
            if at not in (values := grid.places.get(axis, [])):
                runs = ",".join(map(str, values)) or "nothing"
                refuse(where, f"scale {scale} does not run {axis}={at} (it runs {axis}={runs})")


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
        "evals": experiment.evals(scale),
        **({"probes": probes} if (probes := experiment.probes(scale)) else {}),
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
