"""Four ranks train one run, and it is the run of one process (P29, P34, P35, K8, E21)."""

import inspect
import math

import pytest
import torch
import whole
from torch import distributed, nn

from normlab import parallel
from normlab.train import Diverged

EVALS = "evals=[train:batch,val:batch,val:ema,val:precise,val:precise_mean]"

ROUTES = {
    # name: how four ranks form the batch, how one process does, and whether buffers agree, too
    "per rank": (
        ["norm=bn", "nbs=16", "ema_bank=[0.5]"],
        ["norm=ghost", "nbs=16", "ema_bank=[0.5]"],
        True,
    ),
    "accumulated": (["norm=bn", "nbs=8"], ["norm=bn", "nbs=8"], False),
    "ghost": (["norm=ghost", "nbs=8"], ["norm=ghost", "nbs=8"], True),
    "all together": (["norm=sync"], ["norm=bn"], True),
    "groups of two": (["norm=sync", "nbs=32"], ["norm=ghost", "nbs=32"], True),
    "groups, accumulated": (
        ["norm=sync", "nbs=16", "sync_group_size=2"],
        ["norm=ghost", "nbs=16"],
        False,
    ),
    "no statistics": (["norm=gn"], ["norm=gn"], True),
    "virtual": (["norm=virtual", "nbs=12", "micro_batch=8"],) * 2 + (False,),
}


def on_rank(_rank, overrides):
    result = whole.trained(overrides)
    return result | {"digest": whole.digest(result["model"] | result["bank"])}


@pytest.mark.parametrize("route", ROUTES)
def test_ranks_train_what_one_process_does(ranks, route):
    """Weights, loss and evaluations of one epoch, in float64: the same samples in the same batches,
    cropped alike, each counted once. Where the rules for the buffers agree, so do these."""
    theirs, ours, buffers = ROUTES[route]
    found = ranks.run(on_rank, [*theirs, "world_size=4", "buffers=mean", EVALS], timeout=120)
    for result in found:
        for same in ("digest", "rows", "history"):
            assert result[same] == found[0][same]
    alone = whole.trained(
        [*ours, *theirs[2:3], EVALS] if "ema_bank" in str(theirs) else [*ours, EVALS]
    )
    close = {"rtol": 0, "atol": 1e-12}
    for name, expected in alone["model"].items():
        if buffers or not name.rsplit(".", 1)[-1].startswith(("running", "num_batches")):
            torch.testing.assert_close(found[0]["model"][name], expected, **close)
    for name, expected in alone["bank"].items():
        if not name.endswith("count"):
            torch.testing.assert_close(found[0]["bank"][name], expected, **close)
    (row,), (expected,) = found[0]["history"], alone["history"]
    assert row == pytest.approx(expected, rel=1e-12)
    for row, expected in zip(found[0]["rows"], alone["rows"], strict=True):
        if buffers or row["statistics"] != "ema":
            assert row == {**expected, "loss": pytest.approx(expected["loss"], rel=1e-12)}


# -- what travels ---------------------------------------------------------------------------------


def counted(_rank, overrides, steps):
    """How many numbers each collective of some optimizer steps carries."""
    ours = whole.trainer(whole.made(overrides))
    batches = list(ours.data.train_batches(batch_size=64, seed=3, epoch=0, places=ours._places()))
    ours._train_step(*batches[0])  # torch arranges gradients anew after the first one
    found = []
    reduce, gather = distributed.all_reduce, distributed.all_gather

    def counting_reduce(x, *arguments, **options):
        found.append(("reduce", x.numel()))
        return reduce(x, *arguments, **options)

    def counting_gather(parts, x, *arguments, **options):
        found.append(("gather", x.numel()))
        return gather(parts, x, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "all_reduce", counting_reduce)
        patch.setattr(distributed, "all_gather", counting_gather)
        for x, y in batches[1 : 1 + steps]:
            ours._train_step(x, y)
    layers = sum(getattr(module, "batch", "") == "sync" for module in ours.model.modules())
    return found, sum(p.numel() for p in ours.model.parameters()), layers


def test_one_exchange_of_gradients_per_step_however_many_micro_batches(ranks):
    """P35: of all gradients, in the last backward pass."""
    for found, numbers, _ in ranks.run(counted, ["norm=bn", "nbs=8", "world_size=4"], 2):
        assert found == [("reduce", numbers)] * 2


def test_a_synchronized_layer_exchanges_once_each_way(ranks):
    for found, numbers, layers in ranks.run(counted, ["norm=sync", "world_size=4"], 1):
        assert layers > 1
        assert [kind for kind, _ in found] == ["gather"] * layers + ["reduce"] * (layers + 1)
        assert found[-1] == ("reduce", numbers)


# -- what ranks make of their statistics -------------------------------------------------------


def kept(_rank, how):
    """The statistics of a rank before and after the end of an epoch."""
    ours = whole.trainer(whole.made(["norm=bn", "nbs=16", "world_size=4", f"buffers={how}"]))
    for x, y in ours.data.train_batches(batch_size=64, seed=3, epoch=0, places=ours._places()):
        ours._train_step(x, y)
    before = {name: value.clone() for name, value in ours.model.named_buffers()}
    ours._average_statistics()
    return before, dict(ours.model.named_buffers())


@pytest.mark.parametrize("how", ["average", "mean", "broadcast"])
def test_the_end_of_an_epoch_makes_one_population(ranks, how):
    """P29, P30, K8."""
    found = ranks.run(kept, how)
    befores = [before for before, _ in found]
    assert not torch.equal(*[next(iter(before.values())) for before in befores[:2]])
    for _, after in found:
        assert whole.digest(after) == whole.digest(found[0][1])
    for name in (name for name in befores[0] if name.endswith("running_mean")):
        twin = name.replace("mean", "var")
        means, variances = (torch.stack([b[key] for b in befores]) for key in (name, twin))
        mean, var = means.mean(0), variances.mean(0)
        if how == "average":
            var = var + means.var(0, correction=0)
        if how == "broadcast":
            mean, var = means[0], variances[0]
        torch.testing.assert_close(found[0][1][name], mean, rtol=0, atol=1e-12)
        torch.testing.assert_close(found[0][1][twin], var, rtol=0, atol=1e-12)


# -- other settings -------------------------------------------------------------------------------

ROUNDED = ["norm=sync", "precision=bf16", "channels_last=true", "recipe.clip_norm=0.1"]


def settled(_rank, overrides):
    ours = whole.trainer(whole.made(overrides, double=False))
    if "compile=true" in overrides:
        ours.forward = torch.compile(ours.model)
    ours.train_epoch()
    return ours.history[0], whole.digest(ours.model.state_dict())


def test_half_precision_layout_and_clipping_are_those_of_one_process(ranks):
    (row, digest), *others = ranks.run(settled, [*ROUNDED, "world_size=4"])
    assert others == [(row, digest)] * 3
    assert row == pytest.approx(settled(0, ROUNDED)[0], rel=2e-2)


@pytest.mark.slow  # the compiler works for most of a minute
def test_a_compiled_network_trains_over_ranks(ranks):
    (row, digest), *others = ranks.run(
        settled, ["norm=bn", "nbs=16", "world_size=4", "compile=true"], timeout=500
    )
    assert others == [(row, digest)] * 3
    plain = settled(0, ["norm=ghost", "nbs=16"])[0]
    assert row == pytest.approx(plain, rel=1e-3)


def statistic_refused(_rank):
    with pytest.raises(ValueError, match="buffers=average pools means and variances, and") as said:
        whole.made(["norm=l1", "nbs=16", "world_size=4"])
    whole.made(["norm=l1", "nbs=16", "world_size=4", "buffers=mean"])
    return str(said.value)


def test_a_statistic_that_is_no_variance_is_not_pooled(ranks):
    for said in ranks.run(statistic_refused):
        assert said.endswith("the statistic of norm=l1 is no variance: buffers=mean or "
                             "buffers=broadcast")  # fmt: skip


# -- what all have to notice ----------------------------------------------------------------------


def exploding(rank):
    """The loss of one rank is no number."""
    ours = whole.trainer(whole.made(["norm=none", "world_size=4"]))
    ours._loss += math.nan if rank == 2 else 0.0
    try:
        ours.train_epoch()
    except Diverged as error:
        return str(error)


def test_one_rank_that_diverges_ends_all(ranks):
    assert ranks.run(exploding) == ["the training loss is nan at epoch 1, step 3"] * 4


def apart(rank, where):
    """One bit of one rank's state is another: of a weight, or of a running mean."""
    ours = whole.trainer(whole.made(["norm=bn", "world_size=4"]))
    if where == "weight" and rank == 3:
        next(ours.model.parameters()).data[0, 0, 0, 0] += 1e-16
    if where == "buffer":
        ours._average_statistics = lambda: None
    try:
        ours.train_epoch()
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize(("where", "told"), [("weight", "weight"), ("buffer", "running_mean")])
def test_ranks_that_hold_different_things_are_noticed(ranks, where, told):
    """P29: weights when a training starts, and everything before it is evaluated or saved."""
    for said in ranks.run(apart, where):
        assert said.startswith("ranks hold different values of ")
        assert told in said


@pytest.mark.parametrize("key", ["forward_sync_buffers", "broadcast_buffers"])
def test_no_torch_is_left_to_broadcast_buffers(monkeypatch, key):
    """By whichever of its names for that: the oldest torch that is allowed has only the second."""
    given = []
    named = inspect.Signature(
        [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in ("init_sync", key)]
    )

    class Wrapped:
        def __init__(self, _network, **options):
            given.append(options)

        __init__.__signature__ = named
        register_comm_hook = print

    monkeypatch.setattr(parallel, "DistributedDataParallel", Wrapped)
    parallel.wrapped(nn.Linear(2, 2), torch.device("cuda"))
    assert given == [{"init_sync": False, key: False}]
