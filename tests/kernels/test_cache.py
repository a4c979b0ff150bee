"""Where the compiled kernels lie: private, whole or not at all, and optional."""

import logging
import os
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from normlab import kernels
from normlab.kernels import _build, _switch
from normlab.kernels._build import Unavailable, compiled
from normlab.kernels._library import loaded

pytestmark = pytest.mark.skipif(not kernels.available(), reason=kernels.unavailable())

COMPILER = """#!/bin/sh
# Takes a library that is there for what it is asked to compile.
for argument in "$@"; do
    case "$argument" in
        --version) echo "some compiler 1.0"; exit 0;;
        -march=native) {native};;
    esac
    last="$argument"
done
echo called >> "{calls}"
{action}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache, and a compiler that copies what the true one made."""
    whole = compiled()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fake_compiler(tmp_path, monkeypatch, f'cp "{whole}" "$last"')
    return _build.directory()


def fake_compiler(tmp_path, monkeypatch, action, native=":"):
    program = tmp_path / "compiler"
    text = COMPILER.format(action=action, native=native, calls=tmp_path / "calls")
    program.write_text(text)
    program.chmod(0o755)
    monkeypatch.setenv("CXX", str(program))


def calls(tmp_path):
    path = tmp_path / "calls"
    return len(path.read_text().split()) if path.exists() else 0


def test_compiled_once_into_a_directory_of_ones_own(folder, tmp_path):
    first = compiled()
    assert first.parent == folder
    assert compiled() == first
    assert calls(tmp_path) == 1
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(first.stat().st_mode) == 0o700
    assert [path.name for path in folder.iterdir()] == [first.name], "temporary files remain"
    loaded()


@pytest.mark.usefixtures("folder")
def test_another_source_compiler_or_cpu_is_compiled_anew(tmp_path, monkeypatch):
    first = compiled()
    monkeypatch.setattr(_build, "_cpu", lambda: "another CPU")
    assert compiled() != first
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(_build, "FLAGS", (*_build.FLAGS, "-g"))
    fake_compiler(tmp_path, monkeypatch, f'cp "{first}" "$last"')
    assert compiled() != first
    assert calls(tmp_path) == 3


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o707])
def test_a_directory_that_others_can_enter_is_refused(folder, mode):
    folder.mkdir(parents=True)
    folder.chmod(mode)
    with pytest.raises(Unavailable, match="can be entered by other users"):
        compiled()


def test_a_parent_that_others_can_write_is_refused(folder):
    folder.mkdir(parents=True, mode=0o700)
    folder.parent.chmod(0o777)
    with pytest.raises(Unavailable, match="can be written by other users"):
        compiled()


def test_links_are_not_followed(folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    folder.parent.mkdir(parents=True)
    folder.symlink_to(elsewhere)
    with pytest.raises(Unavailable, match="not a directory"):
        compiled()
    folder.unlink()
    library = compiled()
    aside = tmp_path / "aside.so"
    library.rename(aside)
    library.symlink_to(aside)
    with pytest.raises(Unavailable, match="not a file of this user"):
        compiled()


@pytest.mark.usefixtures("folder")
def test_another_owner_is_refused(monkeypatch):
    compiled()
    monkeypatch.setattr(os, "getuid", lambda: os.geteuid() + 1)
    with pytest.raises(Unavailable, match="belongs to another user"):
        compiled()


@pytest.mark.usefixtures("folder")
def test_what_was_cut_short_is_compiled_again(tmp_path):
    library = compiled()
    content = library.read_bytes()
    library.write_bytes(content[: len(content) // 2])
    assert compiled() == library
    assert library.read_bytes() == content
    assert calls(tmp_path) == 2


def test_a_compiler_that_fails(folder, tmp_path, monkeypatch):
    fake_compiler(tmp_path, monkeypatch, 'echo "fused.cpp:1: error: no such thing" >&2; exit 3')
    with pytest.raises(Unavailable, match=r"failed with 3: fused\.cpp:1: error: no such thing"):
        compiled()
    assert list(folder.iterdir()) == []


@pytest.mark.usefixtures("folder")
def test_no_compiler(monkeypatch):
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(Unavailable, match="no C\\+\\+ compiler"):
        compiled()
    monkeypatch.setenv("CXX", "nonesuch -O3")
    with pytest.raises(Unavailable, match="CXX=nonesuch is not a program"):
        compiled()


@pytest.mark.usefixtures("folder")
def test_a_compiler_without_march_native_is_asked_in_another_way(tmp_path, monkeypatch):
    whole = compiled()
    action = f'cp "{whole}" "$last"'
    fake_compiler(tmp_path, monkeypatch, action, native="exit 1")
    assert compiled().exists()


@pytest.mark.usefixtures("folder")
def test_what_is_no_library_is_not_used(tmp_path, monkeypatch):
    fake_compiler(tmp_path, monkeypatch, 'echo "not a library" > "$last"')
    with pytest.raises(Unavailable, match="cannot load"):
        loaded()


def test_kernels_that_compute_something_wrong_are_not_used(monkeypatch):
    """The self-check: sums that are off by a thousandth."""
    from normlab.kernels import _library

    right = _library.Kernels.backward

    def wrong(self, passes, dy, x, dx, *rest):
        right(self, passes, dy, x, dx, *rest)
        dx.mul_(1.05)

    monkeypatch.setattr(_library.Kernels, "backward", wrong)
    with pytest.raises(Unavailable, match="the compiled kernels are wrong by"):
        loaded()


@pytest.mark.usefixtures("folder")
def test_layers_fall_back_and_say_why_once(tmp_path, monkeypatch, caplog):
    import torch

    from normlab.norms import GhostBatchNorm

    fake_compiler(tmp_path, monkeypatch, "exit 1")
    for name, value in (("_ready", None), ("_kernels", None), ("_why", ""), ("_on", True)):
        monkeypatch.setattr(_switch, name, value)
    x = torch.randn(4, 3, 2, 2)
    with caplog.at_level(logging.WARNING):
        layer = GhostBatchNorm(3, nbs=2)
        results = [layer(x) for _ in range(2)]
    assert len(caplog.records) == 1
    assert "without the fused kernels: " in caplog.records[0].getMessage()
    assert "failed with 1" in caplog.records[0].getMessage()
    with pytest.raises(RuntimeError, match=r"no fused kernels: .*failed with 1"):
        kernels.use(True).__enter__()
    monkeypatch.undo()
    with kernels.use(False):
        assert torch.equal(results[0], layer(x))


def test_two_at_once(folder):
    """Both compile, neither sees half of the other's file."""
    start, found = threading.Barrier(2), []

    def compile_too():
        start.wait()
        found.append(compiled())

    threads = [threading.Thread(target=compile_too) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(set(found)) == 1
    assert [path.name for path in folder.iterdir()] == [found[0].name]


CHILD = """
import sys, torch
from normlab import kernels
assert "normlab.kernels" in sys.modules
print(kernels.enabled(), kernels.takes(torch.ones(2, 3, 4, 4)))
"""


@pytest.mark.parametrize(("value", "said"), [("0", "False False"), ("1", "True True")])
def test_the_environment_turns_them_off(value, said):
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        env=os.environ | {"NORMLAB_KERNELS": value},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.strip() == said


def test_nothing_is_compiled_on_import(folder):
    code = "import normlab.kernels, normlab.norms; normlab.norms.BatchNorm(3)"
    subprocess.run([sys.executable, "-c", code], env=dict(os.environ), check=True, timeout=120)
    assert not Path(folder).exists()
