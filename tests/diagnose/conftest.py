import pytest

from diagnose.networks import Trained, train


@pytest.fixture
def trained() -> Trained:
    """A network that nothing is wrong with: leave it as it is, and take a `copy`."""
    return train()
