"""What several rooms' tests share."""

import pytest
from installing import Installed, install_from_wheel


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """normlab installed from its wheel; for tests that add nothing to it."""
    return install_from_wheel(tmp_path_factory.mktemp("installed"))
