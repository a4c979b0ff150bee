"""What a run does on a GPU, as far as that shows without one: tensors of the device "meta" have no
values, so that whoever reads one, and would wait for a GPU, fails; and calls of torch are noted.
"""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import whole
from compositions import composed
from torch import Tensor, distributed, nn

from normlab import build, dist, launch, parallel, ranks, train, worker
from normlab.config import ConfigError, check, run_id
from normlab.data.base import upload
from normlab.norms import SyncBatchNorm

META = torch.device("meta")

NORMS = [
    ["norm=bn", "channels_last=true"],
    ["norm=bn", "nbs=16", "ema_bank=[0.5]", "recipe.clip_norm=1"],
    ["norm=ghost", "nbs=16"],
    ["norm=gn", "channels_last=true"],
    ["norm=renorm", "nbs=16"],
]
"""Not sync, which in one process is bn: what its ranks tell each other is waited for, see below."""


@pytest.mark.parametrize("overrides", NORMS, ids=" ".join)
def test_a_step_waits_for_nothing_that_the_gpu_computes(monkeypatch, overrides):
    """Batches made on the device, forward, backward and update: no number comes back."""
    job = whole.made(overrides, double=False)
    monkeypatch.setattr(job.data, "_resident", {})
    trainer = whole.trainer(job)
    trainer.model.to(META)
    if trainer.bank:
        for held in (trainer.bank._mean, trainer.bank._var, trainer.bank._left):
            held.update({name: x.to(META) for name, x in held.items()})
    trainer.optimizer = build.optimizer(job.config, trainer.model)
    trainer.settings = train.Settings(**vars(trainer.settings) | {"device": META})
    monkeypatch.setattr(trainer, "_autocast", nullcontext)  # which knows of no such device
    trainer._start_epoch()
    trainer.model.train()
    batches = trainer.data.train_batches(
        batch_size=64, seed=0, epoch=0, device=META, channels_last=job.config["channels_last"]
    )
    for _, (x, y) in zip(range(2), batches, strict=False):
        assert x.device == META
        trainer._train_step(x, y)
    assert trainer.step == 2
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        trainer._row()  # the look that LOOK_EVERY steps are for


def test_a_synchronized_layer_waits_once(monkeypatch):
    """For what the ranks tell each other in its forward: how many elements each of them has."""
    layer, x = SyncBatchNorm(4).to(META), torch.randn(8, 4, 3, 3, device=META, requires_grad=True)
    layer._number = 0
    told = [[0, 1, False, True, True, True, count] for count in (72, 0, 36)]
    looks = []
    monkeypatch.setattr(dist, "place", lambda _: (0, len(told)))
    monkeypatch.setattr(dist, "stack", lambda own, _: torch.stack([own] * len(told)))
    monkeypatch.setattr(distributed, "all_reduce", lambda *_, **__: looks.append("backward"))
    tolist = Tensor.tolist
    monkeypatch.setattr(
        Tensor, "tolist", lambda x: tolist(x) if x.device != META else looks.append("look") or told
    )
    y = layer(x)
    assert looks == ["look"]
    y.sum().backward()
    assert looks == ["look", "backward"]
    assert x.grad.shape == x.shape


class Gpu:
    """In the place of a device: no more than its kind."""

    type = "cuda"


def test_what_a_gpu_gets_is_pinned_and_not_waited_for(monkeypatch):
    noted = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda x: noted.append("pinned") or x)
    monkeypatch.setattr(Tensor, "to", lambda x, _, **options: noted.append(options) or x)
    upload(torch.zeros(3), Gpu())
    assert noted == ["pinned", {"non_blocking": True}]


def test_numbers_that_ranks_exchange_are_pinned_too(monkeypatch):
    noted, one = [], torch.ones(1)
    monkeypatch.setattr(torch, "tensor", lambda _, **options: noted.append(options) or one)
    monkeypatch.setattr(Tensor, "to", lambda x, _, **options: noted.append(options) or x)
    dist.numbers([1, 2], Gpu())
    assert noted == [{"dtype": torch.float64, "pin_memory": True}, {"non_blocking": True}]


def test_batches_in_memory_are_uploaded_by_that(monkeypatch):
    """The pixels once, and of each batch its indices and draws."""
    from normlab.data import memory

    noted = []
    monkeypatch.setattr(memory, "upload", lambda x, device: noted.append(len(x)) or x.to(device))
    data = build.data(composed("scale=demo", "data.augment=crop"))
    list(data.train_batches(batch_size=256, seed=0, epoch=0, device=META))
    assert noted == [256, 3] * 3


# -- a rank's device ------------------------------------------------------------------------------


@pytest.mark.parametrize(("cuda", "backend"), [(True, "nccl"), (False, "gloo")])
def test_a_rank_has_a_gpu_of_its_own_and_speaks_nccl(monkeypatch, cuda, backend):
    noted = []
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "set_device", lambda n: noted.append(("device", n)))
    monkeypatch.setattr(
        distributed, "init_process_group", lambda name, **_: noted.append(("group", name))
    )
    monkeypatch.setattr(distributed, "destroy_process_group", lambda: None)
    monkeypatch.setattr(
        distributed, "new_group", lambda backend, **_: noted.append(("beside", backend))
    )
    monkeypatch.setattr(ranks.group.dist, "members", lambda group: group)
    with ranks.joined(cuda=cuda, timeout=60):
        pass
    expected = [("device", 1), ("group", backend), ("beside", "gloo")]
    assert noted == (expected if cuda else expected[1:2])


def test_gradients_travel_in_pieces_on_gpus(monkeypatch):
    noted = []

    class Noting:
        def __init__(self, _, *, init_sync, forward_sync_buffers):
            noted.append((init_sync, forward_sync_buffers))

    monkeypatch.setattr(parallel, "check_same", lambda *_: None)
    monkeypatch.setattr(parallel, "DistributedDataParallel", Noting)
    parallel.wrapped(nn.Linear(2, 2), torch.device("cuda", 1))
    assert noted == [(False, False)]


def test_the_parent_of_ranks_takes_no_memory_of_a_gpu(monkeypatch):
    asked = []

    def construct(config):
        asked.append(config["device"])
        return worker.Job(config, *[None] * 7)

    monkeypatch.setattr(worker, "construct", construct)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = composed("world_size=2", "device=cuda")
    assert launch.constructed(config).config is config
    assert launch.constructed(composed("device=cuda")).config["device"] == "cuda"
    assert asked == ["cpu", "cuda"]


# -- precision and compilation --------------------------------------------------------------------


def test_fp32_is_float32_in_convolutions_and_products():
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    whole.made(["norm=bn"])
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


def test_what_compile_stands_for(monkeypatch):
    noted = []
    monkeypatch.setattr(torch, "compile", lambda network, mode: noted.append(mode) or network)
    network = nn.Linear(1, 1)
    alone = {"domains": ["none"]}
    assert build.compiled(alone | {"compile": False}, network) is None
    for chosen in (True, "graphs"):
        assert build.compiled(alone | {"compile": chosen}, network) is network
    assert noted == [None, "reduce-overhead"]


def test_graphs_are_refused_where_they_cannot_be_replayed(monkeypatch, tmp_path):
    """Before anything is written; at the same ids as before for what there was."""
    monkeypatch.chdir(tmp_path)
    graphs = composed("compile=graphs", "device=cpu")
    with pytest.raises(ValueError, match="compile=graphs needs a GPU, and device=cpu"):
        launch.run(graphs)
    with pytest.raises(ValueError, match="compile=graphs needs a GPU"):
        launch.run(graphs | {"world_size": 2})
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(build, "device", lambda _: SimpleNamespace(type="cuda"))
    build.check_graphs(graphs)
    with pytest.raises(ValueError, match=r"one forward pass per rank and step.*accumulation=8"):
        build.check_graphs(graphs | {"nbs": 16, "batch_size": 128})
    with pytest.raises(ConfigError, match=r"true or false, or graphs .* got compile=gratis"):
        check(graphs | {"compile": "gratis"})


def test_each_way_to_compile_is_a_run_of_its_own():
    ids = {
        run_id(composed(f"compile={how}"), device="cuda", data_digest="0", kernels=False)
        for how in ("false", "true", "graphs")
    }
    assert len(ids) == 3
