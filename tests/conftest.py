"""What several rooms' tests share."""

from collections.abc import Iterator

import pytest
from installing import Installed, install_from_wheel
from ranks import Ranks


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
