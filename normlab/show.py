"""The tables of `normlab show` and `normlab plan`: what there is to choose from, without torch.

Only the card of a layer imports it: the card is the docstring of its class.
"""

import ast
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from textwrap import wrap
from typing import Any

from omegaconf import OmegaConf

from normlab import config, domains, experiment, norms, plugins, probes, protocols, runs


def main(what: str | None, *, root: str) -> int:
    """Print one table, or without a choice the names of all; returns the exit code."""
    if what is None:
        print("normlab show WHAT, where WHAT is one of:", ", ".join([*TABLES, "norm NAME"]))
    else:
        _print(TABLES[what](Path(root)))
    return 0


def norm(name: str | None, *, every: bool = False) -> int:
    """Print the card of one layer, or the page of all (docs/norms.md); returns the exit code.

    Raises ValueError naming the layers there are.
    """
    known = _layers()
    if every:
        sections = [_page_section(*layer) for layer in known.values()]
        print("\n".join([_PAGE, *sections, _shared()]), flush=True)
        return 0
    if name not in known:
        asked = f"no norm '{name}'" if name else "show norm: the card of which layer?"
        if name == _FIXUP:
            raise ValueError(
                "fixup is no layer but an initialization, init=fixup beside norm=none in the CIFAR "
                "ResNets: normlab/models/fixup.py says what it does"
            )
        close = config.near(name or "", list(known))
        raise ValueError(f"{asked}{close} (norms: {', '.join(known)})")
    print("\n".join([*_head(*known[name]), "", _doc(known[name][2])]), flush=True)
    return 0


_FIXUP = "fixup"
"""An initialization that papers compare with norms, as if it were one."""

_PAGE = """\
# The layers

The card of each layer: its formula, which variance it takes, what its population statistics
follow, its limits, its errors and where other libraries differ. A card is the docstring of its
class, which `normlab show norm <name>` prints; this page is what `normlab show norm --all` prints
(`make cards`).
"""


def _layers() -> dict[str, tuple[str, Path, Any]]:
    """What can be chosen: name -> group, file, class; norms first, then convolutions."""
    found: dict[str, tuple[str, Path, Any]] = {}
    for group, room in (("norm", "normlab.norms"), ("conv", "normlab.norms.conv")):
        for name, path in sorted(config.options(group).items()):
            module = str(OmegaConf.select(OmegaConf.load(path), "module") or name)
            if module in import_module(room).names():
                found[name] = (group, path, import_module(room).find(module))
    return found


def _head(group: str, path: Path, layer: Any) -> list[str]:
    """How to get the layer, in Python and on the command line, with its options' defaults."""
    keys = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(keys, dict)
    own = [_spelled(key, value, f"{group}.") for key, value in keys.items() if key not in _LABELS]
    own = [word for word in own if not word.startswith(f"{group}.batch=")]
    lines = [f"{group}={keys['name']}", *wrap(" ".join(own), _WIDTH)]
    ours = layer.__module__.startswith("normlab.norms.")
    source = layer.__module__.rpartition(".")[0] if ours else layer.__module__
    return [f"from {source} import {layer.__name__}", *lines]


def _doc(layer: Any) -> str:
    return (inspect.getdoc(layer) or "").strip()


def _page_section(group: str, path: Path, layer: Any) -> str:
    head = "\n".join(_head(group, path, layer))
    return f"## {path.stem}: {layer.__name__}\n\n```text\n{head}\n\n{_doc(layer)}\n```\n"


def _shared() -> str:
    """What the cards refer to."""
    base = import_module("normlab.norms.base")
    shared = (base.PopulationNorm, base.SampleNorm, base.normalization)
    parts = [f"### {one.__name__}\n\n```text\n{_doc(one)}\n```\n" for one in shared]
    return "\n".join(["## What the layers share\n", *parts]).rstrip("\n")


def plan(overrides: Sequence[str]) -> int:
    """Print how one step's batch is formed, in each of the arms that an experiment has or the
    overrides choose. Raises ``batchplan.PlanError`` where it cannot be."""
    config.register(overrides)
    arms = config.chosen_arms(overrides)
    if len(arms) < 2:
        _print(_planned(overrides))
        return 0
    others = [word for word in overrides if word.partition("=")[0].lstrip("+") != experiment.AXIS]
    tables = [[["arm", arm, ""], *_planned([*others, f"{experiment.AXIS}={arm}"])] for arm in arms]
    for table in tables:
        _print(table if table is tables[0] else [[], *table])
    return 0


def _planned(overrides: Sequence[str]) -> list[list[str]]:
    composed = config.compose(overrides)
    planned = config.plan_of(composed)
    return [["norm", composed["norm"]["name"], _FORMED[planned.batch]], *map(list, planned.rows())]


_FORMED = {
    "per_rank": "a normalization batch is the micro-batch of a rank",
    "ghost": "normalization batches are chunks of a micro-batch",
    "sync": "a normalization batch is the micro-batches of a group of ranks",
    "virtual": "a normalization batch is a micro-batch and extra samples",
    "none": "no sample is normalized with the help of another",
}


def _group(group: str) -> Callable[[Path], list[list[str]]]:
    """A table of one of ``conf/``'s groups: name, what it is, keys with their defaults."""

    def rows(_: Path) -> list[list[str]]:
        table = []
        for name, path in sorted(config.options(group).items()):
            keys = OmegaConf.to_container(OmegaConf.load(path))
            assert isinstance(keys, dict)
            said = [_spelled(key, value) for key, value in keys.items() if key not in _LABELS]
            what = _comment(path)
            if not what and group == "norm":
                what = _first_sentence(str(keys.get("module") or name))
            lines = wrap(what, _WIDTH) + wrap(" ".join(said), _WIDTH)
            table += [[name, *lines[:1]], *(["", line] for line in lines[1:])]
        return table

    return rows


_LABELS = ("name", "module", "scale")
_WIDTH = 88


def _spelled(key: Any, value: Any, prefix: str = "") -> str:
    """A YAML node as the overrides that would make it, `override /group` as group=option."""
    if key == "defaults":
        chosen = [entry for entry in value if isinstance(entry, dict)]
        return " ".join(
            f"{str(group).removeprefix('override /')}={option}"
            for entry in chosen
            for group, option in entry.items()
        )
    if isinstance(value, dict):
        return " ".join(_spelled(inner, below, f"{prefix}{key}.") for inner, below in value.items())
    if isinstance(value, list):
        return f"{prefix}{key}=[{','.join(map(str, value))}]"
    if value is None or isinstance(value, bool):
        value = {None: "null", True: "true", False: "false"}[value]
    return f"{prefix}{key}={value}"


def _comment(path: Path) -> str:
    """The comment at the top of a file."""
    said = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            said.append(line.removeprefix("#").strip())
    return " ".join(said)


def _first_sentence(module: str) -> str:
    """That of a norm's docstring, read from its file: to import it is to import torch.

    Empty where an installed package's class is not in the file that its entry point names.
    """
    path, name = Path(norms.__path__[0]) / f"{module}.py", None
    if not path.is_file():
        point = plugins.entry_points("norms").get(module)
        top, *below = point.module.split(".") if point else [""]
        spec = find_spec(top) if top else None  # a top-level name: nothing is imported
        if point is None or spec is None or spec.origin is None:
            return ""
        inside = Path(spec.origin).parent.joinpath(*below).with_suffix(".py")
        path, name = inside if below else Path(spec.origin), point.attr
    try:
        parsed = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):  # somebody else's file
        return ""
    for node in parsed.body:
        if isinstance(node, ast.ClassDef) and name in (None, node.name):
            said = re.match(r".+?\.(?=\s|$)", ast.get_docstring(node) or "", re.DOTALL)
            return " ".join(said.group().split()) if said else ""
    return ""


def _protocols(_: Path) -> list[list[str]]:
    return [[line] for line in (protocols.__doc__ or "").strip().splitlines()]


def _probes(_: Path) -> list[list[str]]:
    """Each probe and the first paragraph of its module's docstring, where that is ours."""
    table = []
    for name in probes.names():
        path = probes.own().get(name)
        said = ast.get_docstring(ast.parse(path.read_bytes())) if path else ""
        lines = wrap((said or "").partition("\n\n")[0], _WIDTH)
        table += [[name, *lines[:1]], *(["", line] for line in lines[1:])]
    return table


def _domains(_: Path) -> list[list[str]]:
    return [[line] for line in (domains.__doc__ or "").strip().splitlines()]


def _experiments(_: Path) -> list[list[str]]:
    """Each experiment and how many runs it has at each scale."""
    loaded = [experiment.load(name) for name in experiment.names()]
    scales = list(dict.fromkeys(scale for one in loaded for scale in one.scales))
    table = [["runs at", *scales, "title"]]
    for one in loaded:
        runs = [str(len(one.cells(scale))) if scale in one.scales else "" for scale in scales]
        table.append([one.name, *runs, one.title])
    return table


def _runs(root: Path) -> list[list[str]]:
    """One row per run; read without pandas."""
    table = [["id", "status", "scale", "experiment", "measurements", "seconds"]]
    for row, measured in runs.readable(root):
        cells = [row[key] for key in ("id", "status", "scale", "experiment")]
        seconds = row["seconds"]
        table.append(["" if cell is None else str(cell) for cell in cells])
        table[-1] += [str(len(measured)), f"{seconds:.1f}" if seconds else ""]
    return table


TABLES: dict[str, Callable[[Path], list[list[str]]]] = {
    "norms": _group("norm"),
    "convs": _group("conv"),
    "models": _group("model"),
    "data": _group("data"),
    "recipes": _group("recipe"),
    "scales": _group("scale"),
    "tasks": _group("task"),
    "probes": _probes,
    "experiments": _experiments,
    "protocols": _protocols,
    "domains": _domains,
    "runs": _runs,
}


def _print(table: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip_longest(*table, fillvalue="")]
    for row in table:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        sys.stdout.write("  ".join(cells).rstrip() + "\n")
    sys.stdout.flush()  # a reader who has left is met here, where the command line expects it
