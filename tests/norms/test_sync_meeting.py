"""P27: ranks that do not meet in the same call of a layer hear so, by the layer's name."""

from datetime import timedelta

import pytest
import torch
from torch import distributed, nn

from normlab import build, config
from normlab.norms import BatchNorm, SyncBatchNorm
from normlab.norms.sync import name_layers


class Two(nn.Module):
    """Two synchronized layers of different width, or of the same."""

    def __init__(self, group, wide):
        super().__init__()
        self.narrow = SyncBatchNorm(3, group=group)
        self.wide = SyncBatchNorm(wide, group=group)
        self.x = torch.randn(4, 3, 2), torch.randn(4, wide, 2)

    def call(self, which):
        x = self.x[which].requires_grad_()
        return (self.narrow, self.wide)[which](x).square().sum()


def made(wide=3, debug=False, named=True):
    # Long enough for ranks that have to be heard of, short enough to wait for one that never comes.
    group = distributed.new_group(timeout=timedelta(seconds=4))
    model = Two(group, wide)
    if named:
        name_layers(model, debug=debug)
    return model


def said(call, *arguments):
    try:
        call(*arguments)
    except RuntimeError as error:
        return str(error)
    return None


def crossed(rank, wide, before, debug):
    """Rank 2 comes to the second layer where the others are in the first."""
    model = made(wide, debug)
    for _ in range(before):
        model.call(0), model.call(1)
    return said(model.call, int(rank == 2))


@pytest.mark.parametrize(
    ("wide", "before", "debug"), [(3, 0, False), (5, 0, False), (5, 2, True), (3, 2, False)]
)
def test_ranks_in_different_layers_are_told_both(ranks, wide, before, debug):
    """Of one width or not, at the first call or, under debug, at a later one."""
    for told in ranks.run(crossed, wide, before, debug):
        assert told.startswith("ranks are in different synchronized layers, or calls of one (")
        assert f"rank 0: call {before + 1} of narrow" in told
        assert f"rank 2: call {before + 1} of wide" in told


def backwards(rank):
    """Rank 1 goes back through the second layer first."""
    model = made(5, debug=True)
    losses = [model.call(0), model.call(1)]
    return said(losses[int(rank == 1)].backward)


def test_backward_passes_in_another_order_are_told_under_debug(ranks):
    for told in ranks.run(backwards):
        assert "rank 0: call 1 of narrow" in told
        assert "rank 1: call 1 of wide" in told


def absent(rank):
    """Rank 3 comes to the first layer, and never to the second."""
    model = made()
    model.call(0)
    return None if rank == 3 else said(model.call, 1)


def test_a_rank_that_never_comes_is_missed_in_a_layer_with_a_name(ranks):
    """After the process group's timeout."""
    *told, away = ranks.run(absent)
    assert away is None
    for message in told:
        assert message.startswith("wide, a synchronized layer, has not got the other ranks' part")


def exchanges(_rank, debug):
    """How many numbers travel in three steps."""
    model, found = made(debug=debug), []
    gather, reduce = distributed.all_gather, distributed.all_reduce

    def counting(original):
        def call(*arguments, **options):
            found[-1].append(arguments[0][0].numel() if original is gather else "sum")
            return original(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "all_gather", counting(gather))
        patch.setattr(distributed, "all_reduce", counting(reduce))
        for _ in range(3):
            found.append([])
            (model.call(0) + model.call(1)).backward()
    return found


def test_what_is_checked_once_is_not_checked_again(ranks):
    """One exchange per layer and direction from the second step on, unless under debug."""
    first, plain = [3, 13, 3, 13, "sum", "sum"], [13, 13, "sum", "sum"]
    assert ranks.run(exchanges, False) == [[first, plain, plain]] * 4
    whole = [3, 13, 3, 13, 3, "sum", 3, "sum"]
    assert ranks.run(exchanges, True) == [[whole] * 3] * 4


# -- which layers are synchronized ----------------------------------------------------------------


def network(*overrides):
    base = ["scale=demo", "device=cpu", "model=resnet8", "norm=sync", "batch_size=64", *overrides]
    resolved = config.compose(base)
    return build.model(resolved, build.data(resolved)), resolved


def layers_on_rank(_rank, pattern):
    model, resolved = network("world_size=4", "sync_group_size=2", f"sync_layers='{pattern}'")
    found = {n: type(m).__name__ for n, m in model.named_modules() if hasattr(m, "running_mean")}
    groups = {m.group.size() for m in model.modules() if isinstance(m, SyncBatchNorm)}
    optimizer = build.optimizer(resolved, model)
    return found, groups, [len(group["params"]) for group in optimizer.param_groups]


@pytest.mark.parametrize("pattern", ["layer3.*", "!layer3.*"])
def test_a_part_of_the_network_is_synchronized(ranks, pattern):
    """The head alone, or all but the head; the others are each rank's own."""
    plain, resolved = network()
    decays = [len(group["params"]) for group in build.optimizer(resolved, plain).param_groups]
    for found, groups, lengths in ranks.run(layers_on_rank, pattern):
        assert len(set(found.values())) == 2
        for name, kind in found.items():
            inside = name.startswith("layer3.") == (pattern[0] != "!")
            assert kind == ("SyncBatchNorm" if inside else "BatchNorm")
        assert groups == {2}
        assert lengths == decays


def test_a_layer_of_its_own_starts_as_the_other_would():
    """Also where a gamma begins at zero."""
    mixed, _ = network("sync_layers='layer1.*'")
    plain, _ = network()
    assert any(isinstance(module, BatchNorm) for module in mixed.modules())
    for (name, ours), theirs in zip(
        mixed.state_dict().items(), plain.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize(("pattern", "which"), [("head.*", "none"), ("*", "every one")])
def test_a_pattern_that_chooses_nothing_is_refused(pattern, which):
    with pytest.raises(ValueError, match="sync_layers=") as error:
        network(f"sync_layers='{pattern}'")
    assert f"means {which} of the layers" in str(error.value)
    assert "\n" not in str(error.value)
