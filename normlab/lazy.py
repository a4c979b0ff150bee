"""The names of a package that are those of its modules, imported when they are asked for."""

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["exported", "find", "modules"]


def modules(package: str, file: str) -> list[str]:
    """The public modules beside `file`, a package's `__init__.py`, as imports name them."""
    stems = sorted(path.stem for path in Path(file).parent.glob("*.py"))
    return [f"{package}.{stem}" for stem in stems if not stem.startswith("_")]


def exported(among: Iterable[str]) -> list[str]:
    """What the `__all__` of these modules name; imports all of them."""
    return sorted({name for module in among for name in import_module(module).__all__})


def find(package: str, among: Iterable[str], name: str) -> Any:
    """The value of `name` in the first of these modules whose `__all__` has it.

    Raises AttributeError, in the words of Python, where none has.
    """
    if not name.startswith("_"):
        for module in among:
            found = import_module(module)
            if name in found.__all__:
                return getattr(found, name)
    raise AttributeError(f"module {package!r} has no attribute {name!r}")
