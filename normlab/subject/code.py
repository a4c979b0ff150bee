"""The user's own code, named on the command line as `path/to/file.py:name`.

Nothing here is ever named by a file that was loaded: what runs is what the user has typed.
"""

import sys
import traceback
from collections.abc import Callable
from difflib import get_close_matches
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["call", "is_code", "named"]

_loaded: dict[Path, ModuleType] = {}
_folders: set[Path] = set()
"""Where the user's code lies."""


def is_code(spec: str) -> bool:
    """Whether `spec` has the form `path/to/file.py:name`."""
    file, _, name = spec.rpartition(":")
    return file.endswith(".py") and name.isidentifier()


def named(spec: str) -> Callable[..., Any]:
    """What `path/to/file.py:name` names; the file runs once, and may import its neighbours.

    Raises ValueError for a file that is not there, that fails, or has no such function.
    """
    if not is_code(spec):
        raise ValueError(f"'{spec}' does not name a function: write path/to/file.py:name")
    file, _, name = spec.rpartition(":")
    module = _module(Path(file), spec)
    found = getattr(module, name, None)
    if not callable(found):
        public = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        close = get_close_matches(name, public, 1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise ValueError(f"{file} has no function '{name}'{hint}")
    return found  # type: ignore[no-any-return]


def call(function: Callable[..., Any], spec: str, *args: Any, **options: Any) -> Any:
    """`function(*args, **options)`; whatever fails in it is a ValueError of one line."""
    try:
        return function(*args, **options)
    except Exception as error:
        raise ValueError(_in_a_line(spec, error)) from error


def _module(file: Path, spec: str) -> ModuleType:
    if not file.is_file():
        raise ValueError(f"there is no file {file} ({spec})")
    place = file.resolve()
    if place not in _loaded:
        _folders.add(place.parent)
        if (folder := str(place.parent)) not in sys.path:
            sys.path.insert(0, folder)  # as `python file.py` has it
        name = place.stem if place.stem not in sys.modules else f"{place.stem}_{len(_loaded)}"
        found = spec_from_file_location(name, place)
        assert found is not None
        assert found.loader is not None
        module = module_from_spec(found)
        sys.modules[name] = module  # dataclasses and processes that load data look it up
        try:
            found.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise ValueError(_in_a_line(str(file), error)) from error
        _loaded[place] = module
    return _loaded[place]


def _in_a_line(spec: str, error: Exception) -> str:
    """What failed, and at which line of which file it did: the user's, where it is one of them."""
    said = (str(error).splitlines() or [""])[0]
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if Path(frame.filename).parent in _folders]
    at = f" at {theirs[-1].filename}:{theirs[-1].lineno}" if theirs else ""
    return f"{spec} failed{at}: {type(error).__name__}: {said}"
