"""What installed packages add to normlab, found without importing any of them.

A distribution takes part by declaring an entry point in a group ``normlab.<room>``
(``normlab.norms``, ``normlab.models``, ``normlab.data``, ``normlab.experiments``). The directory of
the entry point's top-level package may hold ``conf/`` (searched by Hydra after our own) and
``experiments/*.yaml``. Only the standard library is used, so that the command line stays quick.
"""

import importlib
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

PREFIX = "normlab."


def package_dir(kind: str) -> Path:
    """Our own ``conf`` or ``experiments`` directory: inside the package in a wheel, beside it in a
    checkout and in an editable install.

    Raises FileNotFoundError if the installation has lost it.
    """
    here = Path(__file__).resolve().parent
    for parent in (here, here.parent):
        if (parent / kind).is_dir():
            return parent / kind
    raise FileNotFoundError(f"normlab's own {kind}/ directory is missing: reinstall normlab")


@cache
def _all() -> tuple[EntryPoint, ...]:
    found = importlib.metadata.entry_points()
    ours = (
        e for group in found.groups if group.startswith(PREFIX) for e in found.select(group=group)
    )
    return tuple(sorted(set(ours), key=lambda e: (e.group, e.name, e.value)))


def entry_points(room: str) -> dict[str, EntryPoint]:
    """Name -> entry point of the group ``normlab.<room>``; loading one is the caller's business.

    Raises ValueError if two packages claim the same name, since neither may silently win.
    """
    found: dict[str, EntryPoint] = {}
    for e in _all():
        if e.group != PREFIX + room:
            continue
        if e.name in found:
            raise ValueError(
                f"two installed packages offer {room} '{e.name}' ({found[e.name].value} and"
                f" {e.value}): uninstall one"
            )
        found[e.name] = e
    return found


@cache
def _packages() -> tuple[Path, ...]:
    """Directories of the top-level packages behind the entry points, sorted by package name."""
    directories = []
    for top in sorted({e.module.partition(".")[0] for e in _all()}):
        spec = importlib.util.find_spec(top)  # a top-level name: nothing is imported
        if spec is not None and spec.submodule_search_locations:
            directories += [Path(d) for d in spec.submodule_search_locations]
    return tuple(directories)


def _holding(kind: str) -> list[Path]:
    return [package_dir(kind), *(d / kind for d in _packages() if (d / kind).is_dir())]


def conf_dirs() -> list[Path]:
    """The ``conf`` directories: ours first, then those that installed packages carry."""
    return _holding("conf")


def experiment_dirs() -> list[Path]:
    """The ``experiments`` directories: ours first, then those that installed packages carry."""
    return _holding("experiments")


@dataclass(frozen=True)
class Room:
    """What a room of the package offers by name: its modules that define a certain function, and
    the functions that installed packages name in the entry points of `normlab.<room>`.

    package: the room's dotted name. function: what a module of it has to define. kind: what
    messages call one.
    """

    package: str
    function: str
    kind: str

    @property
    def _entry_points(self) -> dict[str, EntryPoint]:
        return entry_points(self.package.removeprefix(PREFIX))

    def own(self) -> dict[str, Path]:
        """The modules here that define the function, found without importing them."""
        folder = Path(__file__).parent / self.package.removeprefix(PREFIX)
        defines = re.compile(rf"^def {self.function}\(", re.MULTILINE)
        files = sorted(folder.glob("*.py"))
        return {f.stem: f for f in files if defines.search(f.read_text(encoding="utf-8"))}

    def names(self) -> list[str]:
        """What `find` knows: the room's own and those of installed packages."""
        return sorted(self.own().keys() | self._entry_points.keys())

    def find(self, name: str) -> Callable[..., Any]:
        """The function of that name. Raises ValueError naming what exists."""
        if name in self.own():
            module = importlib.import_module(f"{self.package}.{name}")
            return getattr(module, self.function)  # type: ignore[no-any-return]
        if name in (installed := self._entry_points):
            return installed[name].load()  # type: ignore[no-any-return]
        raise ValueError(f"unknown {self.kind} '{name}': one of {', '.join(self.names())}")

    def beside(self, name: str, attribute: str, default: Any) -> Any:
        """What the module that defines the function of that name has besides it."""
        return getattr(sys.modules[self.find(name).__module__], attribute, default)
