"""What Hydra's launchers, the engines of a sweep, need to be told, and where they leave notes.

Jobs of an engine run in other processes, perhaps on other machines. See docs/engines.md.
"""

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

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
    among the runs, where all see it.
    """
    given = _given(overrides)
    if "hydra.sweep.dir" in given:
        yield Path(given["hydra.sweep.dir"])
    elif chosen(overrides).startswith(("submitit", "ray")):
        place = Path(given.get("runs", "runs")).resolve() / ".sweep" / secrets.token_hex(4)
        try:
            yield place
        finally:
            if chosen(overrides) == "ray":  # submitit's jobs have their output there
                shutil.rmtree(place, ignore_errors=True)
    else:
        with tempfile.TemporaryDirectory(prefix="normlab-") as temporary:
            yield Path(temporary)


def _given(overrides: Sequence[str]) -> dict[str, str]:
    words = (word.partition("=") for word in overrides)
    return {key.lstrip("+"): value for key, _, value in words}
