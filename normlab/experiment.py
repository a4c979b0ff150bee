"""What a paper claims, as one file: ``experiments/<name>.yaml`` read into plain objects.

The sweep, the evaluation and the report all read the same file, so that none can ask for something
the others do not know. Nothing here imports torch.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from normlab import plugins

KINDS = ("direction", "equivalence", "shape")
GROUPS = ("model", "norm", "data", "recipe")
"""The groups of ``conf/`` whose value in ``set`` or ``axes`` is an option's name."""

_KEYS = {
    "title", "source", "set", "scales", "protocols", "baseline", "table", "figure", "published",
    "claims",
}  # fmt: skip
_CLAIM_KEYS = {"sentence", "paper", "kind", "primary", "margin", "contrasts", "monotone"}

Term = tuple[float, str, dict[str, Any]]
"""Factor, protocol, and the axes' values of the cell it is read from."""


@dataclass(frozen=True)
class Scale:
    """The grid at one scale: fixed overrides and the swept axes (``seed`` among them)."""

    set: dict[str, Any]
    axes: dict[str, list[Any]]


@dataclass(frozen=True)
class Protocol:
    """One evaluation of every run: its spec (see ``normlab.protocols``) and its column's label."""

    eval: str
    label: str


@dataclass(frozen=True)
class Contrast:
    """A sum of terms in percentage points, taken within a seed."""

    label: str
    terms: list[Term]


@dataclass(frozen=True)
class Cell:
    """One run of the grid: its place on the axes and the overrides that make it."""

    axes: dict[str, Any]
    overrides: list[str]


@dataclass(frozen=True)
class Published:
    """Numbers of a source: error in % by protocol, then by the value of the axis ``x``."""

    label: str
    x: str
    values: dict[str, dict[Any, float]]


@dataclass(frozen=True)
class Claim:
    """One falsifiable sentence with its test; ``margin`` in percentage points."""

    name: str
    sentence: str
    paper: str
    kind: str
    primary: bool
    margin: float
    spec: dict[str, Any] = field(repr=False)

    def contrasts(self, axes: dict[str, list[Any]]) -> list[Contrast]:
        """The contrasts on a grid with these axes; `min` and `max` become the axis' ends.

        Raises ValueError when the grid lacks a cell that the claim speaks of.
        """
        if "monotone" in self.spec:
            raw = list(self._steps(axes))
        else:
            raw = [[tuple(term) for term in terms] for terms in self.spec["contrasts"]]
        return [self._contrast(terms, axes) for terms in raw]

    def _steps(self, axes: dict[str, list[Any]]) -> Iterator[list[Term]]:
        """Neighbours along the axis, ordered so that a true claim makes every contrast positive."""
        spec = self.spec["monotone"]
        axis, sign = (spec["falls"], 1) if "falls" in spec else (spec["rises"], -1)
        values = [v for v in sorted(axes.get(axis, [])) if v <= spec.get("upto", v)]
        for low, high in pairwise(values):
            yield [
                (side * factor, protocol, {axis: value})
                for value, side in ((low, sign), (high, -sign))
                for factor, protocol in spec["terms"]
            ]

    def _contrast(self, terms: list[Any], axes: dict[str, list[Any]]) -> Contrast:
        resolved: list[Term] = []
        for factor, protocol, cell in terms:
            at = {}
            for axis, value in cell.items():
                values = axes.get(axis, [])
                ends = {"min": min, "max": max}
                at[axis] = ends[value](values) if value in ends and values else value
                if at[axis] not in values:
                    raise ValueError(
                        f"claim {self.name} reads {axis}={value}, which this scale does not run "
                        f"(it runs {axis}={','.join(map(str, values)) or 'nothing'})"
                    )
            resolved.append((float(factor), protocol, at))
        label = " ".join(
            f"{'+' if f > 0 else '-'}{'' if abs(f) == 1 else f'{abs(f):g} '}{p}"
            f"({', '.join(f'{k}={v}' for k, v in cell.items())})"
            for f, p, cell in resolved
        )
        return Contrast(label, resolved)


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
        text = json.dumps([self.judging, grid.set, grid.axes], sort_keys=True, default=str)
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
        grid = self.scale(scale)
        fixed = [f"scale={scale}", *(f"{k}={v}" for k, v in {**self.set, **grid.set}.items())]
        cells = []
        for values in product(*grid.axes.values()):
            axes = dict(zip(grid.axes, values, strict=True))
            cells.append(Cell(axes, fixed + [f"{key}={value}" for key, value in axes.items()]))
        return cells

    def evals(self) -> list[str]:
        """The evaluation specs that every run of this experiment needs."""
        return [protocol.eval for protocol in self.protocols.values()]

    def command(self, scale: str) -> str:
        """The command that fills this experiment's missing cells at a scale."""
        return f"normlab sweep {self.name} scale={scale}"


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
    """Read ``experiments/<name>.yaml``. Raises ValueError for an unknown name or a wrong file."""
    known = files()
    if name not in known:
        raise ValueError(f"no experiment '{name}' (experiments: {', '.join(sorted(known))})")
    raw = OmegaConf.to_container(OmegaConf.load(known[name]), resolve=True)
    if not isinstance(raw, dict):
        raise ValueError(f"experiments/{name}.yaml is not a mapping")
    if wrong := set(raw) ^ _KEYS:
        raise ValueError(
            f"experiments/{name}.yaml: unknown or missing keys {sorted(map(str, wrong))}"
        )
    return Experiment(
        name=name,
        title=raw["title"],
        source=raw["source"],
        set=raw["set"],
        scales={
            scale: Scale(set=grid.get("set", {}), axes=grid["axes"])
            for scale, grid in raw["scales"].items()
        },
        protocols={key: Protocol(**value) for key, value in raw["protocols"].items()},
        baseline=raw["baseline"],
        table=raw["table"],
        figure=raw["figure"],
        published=[Published(**value) for value in raw["published"]],
        claims={
            key: _claim(name, key, value, raw["protocols"]) for key, value in raw["claims"].items()
        },
        judging={key: raw[key] for key in ("claims", "protocols", "set")},
    )


def _claim(experiment: str, name: str, raw: dict[str, Any], protocols: dict[str, Any]) -> Claim:
    where = f"experiments/{experiment}.yaml, claim {name}"
    if unknown := set(raw) - _CLAIM_KEYS:
        raise ValueError(f"{where}: unknown keys {sorted(unknown)}")
    if missing := _CLAIM_KEYS - {"contrasts", "monotone"} - set(raw):
        raise ValueError(f"{where}: missing keys {sorted(missing)}")
    if ("contrasts" in raw) == ("monotone" in raw):
        raise ValueError(f"{where}: needs either contrasts or monotone")
    if raw["kind"] not in KINDS:
        raise ValueError(f"{where}: kind '{raw['kind']}' is none of {', '.join(KINDS)}")
    if raw["kind"] != "shape" and len(raw.get("contrasts", [])) != 1:
        raise ValueError(f"{where}: a {raw['kind']} has exactly one contrast")
    contrasts = [raw["monotone"]["terms"]] if "monotone" in raw else raw["contrasts"]
    if strange := {term[1] for terms in contrasts for term in terms} - set(protocols):
        raise ValueError(f"{where}: unknown protocols {sorted(strange)}")
    return Claim(
        name=name,
        sentence=raw["sentence"],
        paper=raw["paper"],
        kind=raw["kind"],
        primary=raw["primary"],
        margin=float(raw["margin"]),
        spec={key: raw[key] for key in ("contrasts", "monotone") if key in raw},
    )


def overlay(name: str, scale: str) -> dict[str, Any]:
    """The Hydra node behind ``experiment=<name>``: overrides, evaluations, the sweep of a scale.

    The axes depend on the scale, so the command line says which one before Hydra composes.
    """
    experiment = load(name)
    grid = experiment.scale(scale)
    defaults: list[Any] = []
    node: dict[str, Any] = {}
    for key, value in {**experiment.set, **grid.set}.items():
        if key in GROUPS:
            defaults.append({f"override /{key}": value})
            continue
        *parents, last = key.split(".")
        inner = node
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    params = {key: ",".join(map(str, values)) for key, values in grid.axes.items()}
    node |= {
        "experiment": name,
        "evals": experiment.evals(),
        "hydra": {"mode": "MULTIRUN", "sweeper": {"params": params}},
    }
    return {"defaults": [*defaults, "_self_"], **node}
