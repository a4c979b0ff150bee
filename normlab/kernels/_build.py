"""Compiles the kernels once per machine, into a cache that nobody else can write to.

A shared library runs with the rights of whoever loads it. So the cache is a directory of this user
(mode 0700, no link), a library in it is a file of this user, and its name holds the digest of its
content: what was cut short, or exchanged, is not loaded.
"""

import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from functools import cache
from pathlib import Path

__all__ = ["Unavailable", "compiled", "directory"]

FLAGS = (
    "-std=c++17", "-O2", "-ftree-vectorize", "-fno-math-errno", "-fno-trapping-math",
    "-ffp-contract=fast", "-fPIC", "-shared", "-pthread",
)  # fmt: skip

NATIVE = ("-march=native", "-mcpu=native", "")
"""Ways to ask for the instructions of this CPU; the first that the compiler takes."""

SECONDS = 300
"""After which a compiler is taken to hang."""


class Unavailable(Exception):
    """Why there are no kernels, in a line."""


def directory() -> Path:
    """$XDG_CACHE_HOME/normlab/kernels, else ~/.cache/normlab/kernels."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "normlab" / "kernels"


def compiled() -> Path:
    """The library for this source, compiler and CPU; compiled if the cache lacks it.

    Raises Unavailable where there is no compiler, it fails, or the cache is not this user's own.
    """
    compiler = _compiler()
    folder = _private(directory())
    key = _key(compiler)
    for found in sorted(folder.glob(f"{key}-*.so")):
        if _intact(found):
            return found
    try:
        return _compile(compiler, folder, key)
    except OSError as error:
        raise Unavailable(f"cannot compile into {folder}: {error.strerror or error}") from error


def _compiler() -> list[str]:
    if given := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(given[0]):
            return given
        raise Unavailable(f"CXX={given[0]} is not a program")
    for name in ("g++", "c++", "clang++"):
        if shutil.which(name):
            return [name]
    raise Unavailable("there is no C++ compiler (g++, c++, clang++, or $CXX)")


def _sources() -> list[Path]:
    return sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in (".cpp", ".h"))


def _key(compiler: list[str]) -> str:
    """A digest of all that the library depends on."""
    version = _ran([*compiler, "--version"], SECONDS).stdout
    parts = [*(path.read_text() for path in _sources()), version, _cpu(), *compiler, *FLAGS]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


@cache
def _cpu() -> str:
    """The model and the instruction sets: a library for another CPU may stop on an instruction."""
    words = [platform.machine(), platform.processor()]
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    wanted = ("model name", "flags", "Features", "CPU part", "isa")
    return "\n".join([*words, *(line for line in lines if line.startswith(wanted))])


def _private(folder: Path) -> Path:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        for path, others in ((folder.parent, 0o022), (folder, 0o077)):
            about = path.lstat()
            if not stat.S_ISDIR(about.st_mode):
                raise Unavailable(f"{path} is not a directory (nor may it be a link)")
            if about.st_uid != os.getuid():
                raise Unavailable(f"{path} belongs to another user")
            if about.st_mode & others:
                what = "written" if others == 0o022 else "entered"
                raise Unavailable(f"{path} can be {what} by other users (chmod 700)")
    except (OSError, AttributeError) as error:  # without getuid, there is no owner to check
        why = getattr(error, "strerror", None) or error
        raise Unavailable(f"cannot keep a library in {folder}: {why}") from error
    return folder


def _intact(path: Path) -> bool:
    """Whether it is this user's own file with the content that its name says; else it goes."""
    about = path.lstat()
    if not stat.S_ISREG(about.st_mode) or about.st_uid != os.getuid():
        raise Unavailable(f"{path} is not a file of this user")
    if path.stem.split("-")[1] == _digest(path):
        return True
    path.unlink(missing_ok=True)
    return False


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:24]


def _compile(compiler: list[str], folder: Path, key: str) -> Path:
    source = next(path for path in _sources() if path.suffix == ".cpp")
    handle, name = tempfile.mkstemp(suffix=".tmp", dir=folder)
    os.close(handle)
    temporary = Path(name)
    try:
        for native in NATIVE:
            arguments = [*compiler, *FLAGS, *[native] * bool(native), str(source), "-o", name]
            done = _ran(arguments, SECONDS)
            if done.returncode == 0:
                temporary.chmod(0o700)
                # Whole or not at all, also where another process compiles the same.
                return temporary.rename(folder / f"{key}-{_digest(temporary)}.so")
        lines = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
        raise Unavailable(f"{compiler[0]} failed with {done.returncode}: {lines[0].strip()}")
    finally:
        temporary.unlink(missing_ok=True)


def _ran(arguments: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            arguments, capture_output=True, text=True, timeout=seconds, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{arguments[0]} does not run: {error}") from error
