"""The house keeps its own rules: who may import whom, small files, nothing missing from a group."""

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from normlab import data, experiment, models, norms, tasks

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "normlab"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
LONGEST = 400


# -- the import rules -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    inside: frozenset[str]
    outside: frozenset[str]
    everything: bool


def rules(text: str) -> dict[str, Rule]:
    """The table under the heading Rooms: room -> what it may import."""
    table = text.split("\n## Rooms\n")[1].split("\n## ")[0]
    found: dict[str, Rule] = {}
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) != 4 or not cells[0].startswith("`"):
            continue
        inside, outside = (frozenset(re.findall(r"`([\w.]+)`", cell)) for cell in cells[2:])
        for room in re.findall(r"`(\w+)`", cells[0]):
            assert room not in found, f"two rows for {room}"
            found[room] = Rule(inside, outside, cells[2] == "everything")
    return found


def imported(path: Path, package: Path) -> Iterator[str]:
    """Dotted names of all that a module imports, strings given to import_module included."""
    here = ["normlab", *path.relative_to(package).parts[:-1]]

    def exact(module: str, name: str) -> str:
        """`from normlab.norms import base` imports normlab.norms.base; a class is no module."""
        parts = [*module.split(".")[1:], name]
        target = package.joinpath(*parts)
        is_module = target.with_suffix(".py").is_file() or target.is_dir()
        return f"{module}.{name}" if module.split(".")[0] == "normlab" and is_module else module

    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (exact(module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call):
            function = node.func
            called = getattr(function, "attr", getattr(function, "id", ""))
            if called in ("import_module", "__import__") and node.args:
                first: ast.AST = node.args[0]
                if isinstance(first, ast.JoinedStr) and first.values:
                    first = first.values[0]
                if isinstance(first, ast.Constant) and isinstance(first.value, str):
                    yield first.value.rstrip(".")


def forbidden(package: Path, allowed: dict[str, Rule]) -> list[str]:
    """One line for each import that the rules do not allow, and for each room without a row."""
    wrong = []
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package)
        room = relative.with_suffix("").parts[0]
        if room not in allowed:
            wrong.append(f"{relative}: room '{room}' has no row in the table")
            continue
        rule = allowed[room]
        for name in imported(path, package):
            top, *rest = name.split(".")
            if top == "normlab":
                target = ".".join(rest)
                fine = (
                    rule.everything
                    or not rest  # the version
                    or rest[0] == room
                    or any(target == a or target.startswith(a + ".") for a in rule.inside)
                )
            else:
                fine = top in sys.stdlib_module_names or top in rule.outside
            if not fine:
                wrong.append(f"{relative} imports {name}")
    return wrong


def test_every_import_is_in_the_table() -> None:
    assert forbidden(PACKAGE, rules(ARCHITECTURE.read_text())) == []


def test_the_table_has_no_row_without_a_room() -> None:
    rooms = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in PACKAGE.rglob("*.py")}
    assert set(rules(ARCHITECTURE.read_text())) == rooms


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        ("norms/base.py", "import normlab.config", "norms/base.py imports normlab.config"),
        ("norms/base.py", "from normlab import config", "norms/base.py imports normlab.config"),
        ("norms/base.py", "from .. import config", "norms/base.py imports normlab.config"),
        ("norms/base.py", "from ..config import Config", "norms/base.py imports normlab.config"),
        ("norms/base.py", "def f():\n    import hydra", "norms/base.py imports hydra"),
        (
            "population/bank.py",
            "from normlab.norms import ghost",
            "population/bank.py imports normlab.norms.ghost",
        ),
        (
            "batchplan.py",
            "import importlib\nimportlib.import_module(f'normlab.norms.{1}')",
            "batchplan.py imports normlab.norms",
        ),
        ("runs.py", "import torch", "runs.py imports torch"),
        ("helpers.py", "", "helpers.py: room 'helpers' has no row in the table"),
    ],
)
def test_a_forbidden_import_is_caught(tmp_path: Path, file: str, line: str, complaint: str) -> None:
    package = tmp_path / "normlab"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    with (package / file).open("a") as module:
        module.write(f"\n\n{line}\n")
    assert complaint in forbidden(package, rules(ARCHITECTURE.read_text()))


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("cli", {"torch", "hydra", "omegaconf", "pandas", "numpy", "matplotlib"}),
        ("config, experiment, plugins, protocols, batchplan, runs, schedule", {"torch", "pandas"}),
        ("report", {"torch"}),
    ],
)
def test_what_importing_costs(modules: str, heavy: set[str]) -> None:
    code = f"import sys\nfrom normlab import {modules}\nprint(*{heavy!r} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


# -- what crosses processes -----------------------------------------------------------------------

PICKLES = {
    "pickle", "dill", "cloudpickle", "all_gather_object", "broadcast_object_list", "gather_object",
    "recv_object_list", "scatter_object_list", "send_object_list",
}  # fmt: skip
"""Modules and collectives that send objects, and run what is in them where they arrive."""


def pickling(package: Path) -> list[str]:
    """One line for each use of what pickles."""
    found = []
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = {getattr(node, "attr", ""), getattr(node, "id", "")}
            if isinstance(node, ast.Import | ast.ImportFrom):
                names |= {alias.name for alias in node.names} | {getattr(node, "module", "")}
            found += [f"{path.name}:{node.lineno} {name}" for name in sorted(names & PICKLES)]
    return found


def test_ranks_exchange_tensors_and_never_pickles() -> None:
    assert pickling(PACKAGE) == []


def test_torchs_collectives_of_objects_are_all_known() -> None:
    from torch import distributed

    assert {name for name in dir(distributed) if "_object" in name} <= PICKLES


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "from torch.distributed import all_gather_object",
        "distributed.broadcast_object_list(parts)",
        "def f(send=all_gather_object): ...",
    ],
)
def test_a_pickle_is_caught(tmp_path: Path, line: str) -> None:
    (tmp_path / "dist.py").write_text(f"from torch import distributed\n{line}\n")
    assert len(pickling(tmp_path)) == 1


# -- the tests' oracles ---------------------------------------------------------------------------

ORACLES = Path(__file__).resolve().parent / "oracles"


def borrowed(folder: Path) -> list[str]:
    """One line for each import of an oracle that is of neither formulas nor arithmetic."""
    fine = {*sys.stdlib_module_names, "numpy", "torch", "oracles"} - {"importlib"}
    found = [(path, name) for path in folder.rglob("*.py") for name in imported(path, folder)]
    return [f"{path.name} imports {name}" for path, name in found if name.split(".")[0] not in fine]


def test_an_oracle_knows_nothing_of_what_it_judges() -> None:
    assert len(list(ORACLES.glob("*.py"))) > 10
    assert borrowed(ORACLES) == []


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("from normlab.norms import BatchNorm", "normlab.norms"),
        ("def f():\n    import normlab.population", "normlab.population"),
        ("from ..norms.zoo import make", "norms.zoo"),
        ("from norms.zoo import make", "norms.zoo"),
        ("__import__('normlab.norms')", "normlab.norms"),
        ("import importlib", "importlib"),
    ],
)
def test_an_oracle_that_borrows_is_caught(tmp_path: Path, line: str, name: str) -> None:
    (tmp_path / "moments.py").write_text(f"import numpy as np\n{line}\n")
    assert borrowed(tmp_path) == [f"moments.py imports {name}"]


# -- files ----------------------------------------------------------------------------------------


def tracked() -> list[Path]:
    """The files under version control, or every file of an unpacked source archive."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_no_module_is_long() -> None:
    paths = [path for folder in (PACKAGE, ROOT / "tests") for path in folder.rglob("*.py")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in paths}
    assert {path: n for path, n in lengths.items() if n > LONGEST} == {}


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    places = re.compile(r"(?<![\w./-])/(?:root|home|work|tmp|Users|mnt)/\w")
    found = []
    for path in tracked():
        try:
            text = path.read_text()
        except UnicodeDecodeError:  # figures
            continue
        found += [f"{path.name}: {match.group()}" for match in places.finditer(text)]
    assert found == []


def test_links_between_pages_lead_somewhere() -> None:
    dead = []
    for page in (path for path in tracked() if path.suffix == ".md"):
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
            if "://" not in link and not (page.parent / link).exists():
                dead.append(f"{page.name} -> {link}")
    assert dead == []


# -- nothing is missing from a group --------------------------------------------------------------

ROOMS = {"norm": norms, "model": models, "data": data, "task": tasks}
OPTIONS = [
    (group, path) for group in ROOMS for path in sorted((ROOT / "conf" / group).glob("*.yaml"))
]


@pytest.mark.parametrize(
    ("group", "path"), OPTIONS, ids=lambda value: getattr(value, "stem", value)
)
def test_an_option_names_a_module_that_exists(group: str, path: Path) -> None:
    option = yaml.safe_load(path.read_text())
    assert option["name"] == path.stem
    chosen = option.get("module", option["name"])
    assert chosen == tasks.CLASSIFIER or callable(ROOMS[group].find(chosen))


@pytest.mark.parametrize("group", ROOMS)
def test_every_module_can_be_chosen(group: str) -> None:
    options = [yaml.safe_load(path.read_text()) for g, path in OPTIONS if g == group]
    chosen = {option.get("module", option["name"]) for option in options}
    assert set(ROOMS[group].names()) == chosen - {tasks.CLASSIFIER}


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in (ROOT / "experiments").glob("*.yaml"))
)
def test_an_experiment_loads_and_every_claim_can_be_judged(name: str) -> None:
    loaded = experiment.load(name)
    for scale in loaded.scales:
        grid = loaded.scale(scale)
        assert loaded.cells(scale)
        for claim in () if grid.given else loaded.claims.values():  # given: as the user's runs are
            assert claim.contrasts(grid.places)
    wanted = {*loaded.table["columns"], *loaded.figure["series"]}
    published = {protocol for source in loaded.published for protocol in source.values}
    assert wanted | published <= set(loaded.protocols)
