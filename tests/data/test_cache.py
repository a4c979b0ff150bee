"""The cache: atomic, shared, and never trusted when damaged."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
from forked import CONTEXT

from normlab.data import cache


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMLAB_CACHE", str(tmp_path / "cache"))


def test_an_array_is_made_once_and_opened_read_only() -> None:
    made = []

    def make() -> np.ndarray:
        made.append(1)
        return np.arange(6).reshape(2, 3)

    for _ in range(2):
        found = cache.array("a", make)
        assert np.array_equal(found, np.arange(6).reshape(2, 3))
        assert not found.flags.writeable
    assert len(made) == 1
    assert [f.name for f in cache.directory().glob("[!.]*")] == ["a.npy"]


def _ask(folder: str, kind: str) -> None:
    """A process that wants what is not there yet, and leaves a mark if it makes it."""
    os.environ["NORMLAB_CACHE"] = folder

    def make() -> np.ndarray:
        (Path(folder).parent / f"made-{os.getpid()}").touch()
        time.sleep(0.3)
        return np.arange(3)

    if kind == "array":
        cache.array("a", make)
    else:
        cache.text("a", lambda: str(make()))


@pytest.mark.parametrize("kind", ["array", "text"])
def test_of_processes_that_find_it_missing_one_makes_it(tmp_path: Path, kind: str) -> None:
    asking = [CONTEXT.Process(target=_ask, args=(str(cache.directory()), kind)) for _ in range(3)]
    for process in asking:
        process.start()
    for process in asking:
        process.join(60)
    assert [process.exitcode for process in asking] == [0, 0, 0]
    assert len(list(tmp_path.glob("made-*"))) == 1


@pytest.mark.parametrize("damage", [b"", b"not an array", None])
def test_a_damaged_file_is_made_again(damage: bytes | None) -> None:
    cache.array("a", lambda: np.arange(1000))
    file = cache.directory() / "a.npy"
    file.write_bytes(file.read_bytes()[:-1] if damage is None else damage)
    assert np.array_equal(cache.array("a", lambda: np.arange(1000)), np.arange(1000))


def test_a_failure_while_writing_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "save", fails)
    with pytest.raises(KeyboardInterrupt):
        cache.array("a", lambda: np.arange(3))
    assert [f.name for f in cache.directory().iterdir()] == [".a.npy.lock"]


def test_an_unwritable_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NORMLAB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OSError, match="NORMLAB_CACHE"):
        cache.array("a", lambda: np.arange(3))


def test_the_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("NORMLAB_CACHE", "/own")
    assert cache.directory() == Path("/own")
    monkeypatch.delenv("NORMLAB_CACHE")
    assert cache.directory() == Path("/xdg/normlab")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.directory() == Path.home() / ".cache" / "normlab"


def test_a_digest_follows_content_and_order_not_names(tmp_path: Path) -> None:
    a, b, copy = tmp_path / "a", tmp_path / "b", tmp_path / "copy"
    a.write_bytes(b"1")
    b.write_bytes(b"2")
    copy.write_bytes(b"1")
    first = cache.content_digest([a, b])
    assert len(first) == 16
    assert first == cache.content_digest([a, b]) == cache.content_digest([copy, b])
    assert first != cache.content_digest([b, a])
    a.write_bytes(b"11")
    assert first != cache.content_digest([a, b])
