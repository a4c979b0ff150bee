"""The rest of what the layers promise through the fused kernels, which are the default.

Tests of the files named here, where the pure path is tested; where those ask for torch's bits, up
to rounding.
"""

from functools import partial

import pytest
import torch

from normlab import kernels

from .fused import again, near
from .test_fused import OF_EVERY_LAYER

FILES = (
    "norms.test_base", "norms.test_bn", "norms.test_choices", "norms.test_contexts",
    "norms.test_contract", "norms.test_contract_precision", "norms.test_contract_transformed",
    "norms.test_frozen", "norms.test_renorm_recomputation", "norms.test_separate",
    "norms.test_separate_domains", "norms.test_separate_population", "norms.test_virtual_network",
    "surgery.test_choices", "surgery.test_conversion", "surgery.test_conversion_layers",
    "surgery.test_fusion",
)  # fmt: skip

LEFT_OUT = (
    OF_EVERY_LAYER,  # in test_fused.py
    "test_the_group_of_ranks_is_kept",  # computes nothing
    "test_trains_on_as_torch_would",  # steps of a training multiply what differs
)
TORCHS_BITS = ("test_bn_", "test_frozen_", "test_conversion_")

for _file in FILES:
    for _name, _value in again(_file, lambda name: name not in LEFT_OUT):
        globals()[_name if _name.startswith("Test") else f"test_{_name}"] = _value

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not kernels.available(), reason=kernels.unavailable()),
]


@pytest.fixture(autouse=True)
def _through_the_kernels(monkeypatch, request):
    if request.node.name.startswith(TORCHS_BITS):
        # torch rounds some sums of half values to half in channels_last.
        rounding = 2**-8 if "bfloat16" in request.node.name else 5e-6
        monkeypatch.setattr(torch, "equal", partial(near, rounding=rounding))
    with kernels.use(True):
        yield
