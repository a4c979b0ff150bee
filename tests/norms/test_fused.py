"""What the layers promise, once more through the fused kernels, which are the default.

The tests are those of the files named here, where the pure path is tested. They are what the
kernels compute, in every layout and precision; what is built on it is in test_fused_long.py.
"""

import pytest

from normlab import kernels

from .fused import again

FILES = ("ghost", "gn", "instance", "offsets_of_large_batches", "renorm", "virtual")
OF_EVERY_LAYER = "test_layouts_change_rounding_only"

for _file in FILES:
    globals().update({f"test_{k}": v for k, v in again(f"norms.test_{_file}")})
globals().update(
    {f"test_{k}": v for k, v in again("norms.test_contract", lambda name: name == OF_EVERY_LAYER)}
)

pytestmark = pytest.mark.skipif(not kernels.available(), reason=kernels.unavailable())


@pytest.fixture(autouse=True)
def _through_the_kernels():
    with kernels.use(True):
        yield
