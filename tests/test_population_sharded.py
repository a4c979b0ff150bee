"""Models that FSDP has sharded: an estimate refuses them by name."""

import pytest
import torch
from torch import distributed, nn

from normlab.norms import BatchNorm
from normlab.population import estimate


@pytest.fixture
def alone():
    """A process group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.filterwarnings("ignore:FSDP is switching")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["fully_shard", "FullyShardedDataParallel"])
def test_a_sharded_model_is_refused(kind):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1)), BatchNorm(4))
    batches = [torch.randn(2, 3, 4, 4)]
    assert len(estimate(model, batches, estimator="mean")) == 1
    if kind == "fully_shard":
        mesh = distributed.init_device_mesh("cpu", (1,))
        fsdp.fully_shard(model[0], mesh=mesh)
    else:
        model[0] = fsdp.FullyShardedDataParallel(model[0], device_id=torch.device("cpu"))
    for group in (None, "alone"):
        with pytest.raises(ValueError, match=r"^0 is sharded over ranks \(FSDP\)") as caught:
            estimate(model, batches, estimator="mean", group=group)
        assert "\n" not in str(caught.value)
