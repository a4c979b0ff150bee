"""What the package imports is declared, and what is declared is pinned."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TRACKERS = {"wandb": "wandb", "mlflow": "mlflow-skinny"}
"""Packages that the tests do without, each an extra, and the distributions that hold them."""


def names(requirements: list[str]) -> set[str]:
    return {canonical(re.split(r"[<>=!~;\[ ]", text)[0]) for text in requirements}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported() -> set[str]:
    """The distributions whose packages a file of normlab imports, anywhere in it."""
    packages: set[str] = set()
    for path in (ROOT / "normlab").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                packages |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                packages.add(node.module.split(".")[0])
    known = packages_distributions()
    outside = packages - set(sys.stdlib_module_names) - {"normlab"}
    return {canonical((known.get(p) or [TRACKERS[p]])[0]) for p in outside}


def test_what_is_imported_is_declared() -> None:
    extras = PROJECT["optional-dependencies"]
    used = [extras[name] for name in ("bench", "models", *TRACKERS)]
    assert imported() <= names(PROJECT["dependencies"]).union(*map(names, used))


def pins(file: str) -> set[str]:
    return names([line for line in (ROOT / file).read_text().splitlines() if "==" in line])


def test_what_is_declared_is_pinned() -> None:
    extras = dict(PROJECT["optional-dependencies"])
    assert names(extras.pop("ray")) <= pins("constraints-ray.txt")
    for name in TRACKERS:
        del extras[name]
    declared = names(PROJECT["dependencies"]).union(*map(names, extras.values()))
    assert declared <= pins("constraints.txt")


def test_the_environment_of_ray_differs_where_it_says_so() -> None:
    """Ray's file repeats no pin of the other: what it names is new, or has another version."""
    lines = [set((ROOT / file).read_text().splitlines()) for file in (
        "constraints.txt", "constraints-ray.txt")]  # fmt: skip
    assert {line for line in lines[0] & lines[1] if not line.startswith("#")} == set()


def test_the_tests_have_the_engines_that_share_an_environment() -> None:
    extras = PROJECT["optional-dependencies"]
    assert names(extras["joblib"]) | names(extras["slurm"]) <= names(extras["dev"])


def test_the_tests_have_what_the_benchmarks_compare_with() -> None:
    extras = PROJECT["optional-dependencies"]
    assert names(extras["bench"]) <= names(extras["dev"])


def test_the_tests_have_the_tracker_that_is_small() -> None:
    extras = PROJECT["optional-dependencies"]
    assert names(extras["tensorboard"]) <= names(extras["dev"])


def test_the_tests_have_what_a_users_model_comes_with() -> None:
    extras = PROJECT["optional-dependencies"]
    assert names(extras["models"]) <= names(extras["dev"])
