"""What Hydra's launchers, the engines of a sweep, need to be told, and the notes that jobs leave.

Jobs of an engine run in other processes, perhaps on other machines. See docs/engines.md.
"""

import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from normlab import runs

# A Ray that a sweep starts for itself serves this machine and nobody else: without this variable
# its processes listen on every interface (its name speaks of systems where that is the default).
# The token is for this sweep and is never written anywhere; usage statistics stay here.
_RAY = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
}
_DASHBOARD = "hydra.launcher.ray.init.include_dashboard"


def chosen(overrides: Sequence[str]) -> str:
    """The launcher that the overrides choose."""
    return _given(overrides).get("hydra/launcher", "basic")


@contextmanager
def prepared(overrides: Sequence[str]) -> Iterator[list[str]]:
    """The overrides that an engine needs besides the given ones, its environment set meanwhile.

    A Ray cluster that is named by ``ray.init.address`` or RAY_ADDRESS is used as it is. Raises
    ValueError for SLURM where there is none.
    """
    given = _given(overrides)
    if chosen(overrides) == "submitit_slurm" and shutil.which("srun") is None:
        raise ValueError(
            "hydra/launcher=submitit_slurm needs SLURM's srun, which is not on this machine "
            "(hydra/launcher=submitit_local runs the same jobs here)"
        )
    address = given.get("hydra.launcher.ray.init.address", os.environ.get("RAY_ADDRESS"))
    if chosen(overrides) != "ray" or address not in (None, "null", "local"):
        yield []
        return
    before = dict(os.environ)
    for key, value in (_RAY | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}).items():
        os.environ.setdefault(key, value)
    try:
        yield [] if _DASHBOARD in given else [f"++{_DASHBOARD}=false"]
    finally:
        for key in os.environ.keys() - before.keys():
            del os.environ[key]


@contextmanager
def scratch(overrides: Sequence[str]) -> Iterator[Path]:
    """A directory for the jobs' notes, and for what Hydra itself writes during a sweep.

    submitit keeps its own files there; its jobs, and Ray's, may run on other machines: theirs stays
    among the runs, where all see it. Each sweep has one of its own, in that of hydra.sweep.dir if
    it is given. It is removed, unless jobs were begun that have their output there.
    """
    given = _given(overrides)
    named = given.get("hydra.sweep.dir")
    if named is None and not chosen(overrides).startswith(("submitit", "ray")):
        with tempfile.TemporaryDirectory(prefix="normlab-") as temporary:
            yield Path(temporary)
        return
    above = Path(named) if named else Path(given.get("runs", "runs")) / ".sweep"
    place = above.resolve() / secrets.token_hex(4)
    made = [parent for parent in place.parents if not parent.exists()]
    try:
        yield place
    finally:
        begun = any(place.glob("*/"))
        if not (begun and (named or chosen(overrides).startswith("submitit"))):
            shutil.rmtree(place, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # there is something in it
                parent.rmdir()


def leave(place: Path, job: int, note: dict[str, Any]) -> None:
    """Note what became of a job. Each has a file: on a disk that machines share, appending to one
    is no single act. A job that is run again replaces its note."""
    place.mkdir(parents=True, exist_ok=True)
    runs.write_atomically(place / f"outcome-{job}.json", json.dumps(note))


def notes(place: Path) -> list[dict[str, Any]]:
    """The notes of all jobs, by their numbers.

    To be read once, after the jobs: of what it has listed before, NFS may show an old state.
    """
    found = {int(path.stem.partition("-")[2]): path for path in place.glob("outcome-*.json")}
    return [json.loads(found[job].read_text()) for job in sorted(found)]


def _given(overrides: Sequence[str]) -> dict[str, str]:
    words = (word.partition("=") for word in overrides)
    return {key.lstrip("+"): value for key, _, value in words}
