"""What the layers promise, once more through the fused kernels.

The tests are those of the files named here, where the pure path is tested; left out are files that
hold that path to torch's bits or to its choice of operators.
"""

from importlib import import_module

import pytest

from normlab import kernels

FILES = (
    "contract", "contract_precision", "ghost", "gn", "instance", "offsets_of_large_batches",
    "renorm", "renorm_recomputation", "virtual",
)  # fmt: skip

for _file in FILES:
    for _name, _value in vars(import_module(f".test_{_file}", __package__)).items():
        if _name.startswith("test_"):  # under a name of its own: files use the same ones
            globals()[f"test_{_file}_{_name.removeprefix('test_')}"] = _value

pytestmark = pytest.mark.skipif(not kernels.available(), reason=kernels.unavailable())


@pytest.fixture(autouse=True)
def _through_the_kernels():
    with kernels.use(True):
        yield
