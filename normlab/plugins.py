"""What installed packages add to normlab, found without importing any of them.

A distribution takes part by declaring an entry point in a group ``normlab.<room>``
(``normlab.norms``, ``normlab.models``, ``normlab.data``, ``normlab.experiments``). The directory of
the entry point's top-level package may hold ``conf/`` (searched by Hydra after our own) and
``experiments/*.yaml``. Only the standard library is used, so that the command line stays quick.
"""

import importlib.metadata
import importlib.util
from functools import cache
from importlib.metadata import EntryPoint
from pathlib import Path

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
