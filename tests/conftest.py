"""What several rooms' tests share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from installing import Installed, install_from_wheel
from ranks import Ranks

pytest_plugins = ["skips"]

# Before torch is loaded, here and in the processes that tests start: what tests compute is tiny,
# and to share it out among threads takes several times as long as to do it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The reference path, unless a test says otherwise: it is the same on every machine, and to the bit
# what the tests of the layers compare with.
os.environ.setdefault("NORMLAB_KERNELS", "0")


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In an empty directory, where no results count as done; threads are put back afterwards."""
    import torch

    from normlab import launch

    monkeypatch.chdir(tmp_path)
    launch._committed.cache_clear()
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """normlab installed from its wheel; for tests that add nothing to it."""
    return install_from_wheel(tmp_path_factory.mktemp("installed"))


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Four processes in one gloo process group, for the whole suite."""
    pool = Ranks(4, tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.stop()
