"""Exchanges that are counted, memory that is kept, and times taken in turns (6 s)."""

import math

import pytest
import torch
from torch import distributed, nn

from normlab import dist
from normlab.norms.bn import BatchNorm
from normlab.norms.sync import SyncBatchNorm
from normlab.tasks import costs
from normlab.tasks.mirror import mirrored

CPU = torch.device("cpu")
TINY = [
    "task.width=4", "task.depth=2", "task.size=4", "task.samples=8", "task.batches=8",
    "task.rounds=1",
]  # fmt: skip


def test_mirrored_ranks_hold_what_this_one_holds():
    x = torch.randn(3, 2, requires_grad=True)
    with mirrored(5) as traffic:
        assert dist.place() == (0, 5)
        assert torch.equal(dist.all_gather(x), x.repeat(5, 1))
        assert torch.allclose(dist.all_reduce(x), 5 * x)
        assert traffic.collectives == 3  # a gather says beforehand what comes
        assert traffic.volume == 12 * 8 + 2 * 6 * 4
    assert not distributed.is_initialized()
    assert dist.place() == (0, 1)


def test_mirrored_ranks_come_and_go():
    for ranks in (2, 3):
        with mirrored(ranks):
            assert distributed.get_world_size() == ranks
            with pytest.raises(RuntimeError, match="is a rank already"), mirrored(2):
                pass
    assert not distributed.is_initialized()


def test_a_synchronized_norm_over_mirrored_ranks_is_a_batch_norm():
    """All ranks have the same samples: their statistics are this one's."""
    x = torch.randn(6, 4, 3, 3)
    with mirrored(8):
        y = SyncBatchNorm(4)(x)
    assert torch.allclose(y, BatchNorm(4)(x), atol=1e-5)


@pytest.mark.parametrize(("depth", "ranks", "width"), [(1, 2, 4), (3, 8, 8)])
def test_exchanges_are_counted_to_the_byte(depth, ranks, width):
    x = torch.randn(6, width, 2, 2)
    found = costs.exchanged(x, width, depth, ranks)
    assert found["collectives_sync"] == 2 * depth == found["collectives_sync_closed"]
    assert found["bytes_sync"] == depth * (8 * (7 + 2 * width) + 8 * 2 * width)
    one = 6 * width * 4 * 4  # bytes of a rank's samples
    order = 8 * 6 * ranks
    assert found["bytes_shuffle"] == 2 * 96 + 2 * one + order + 2 * ranks * one
    assert found["bytes_shuffle_closed"] == found["bytes_shuffle"]
    assert found["collectives_shuffle"] == 7
    assert found["collectives_bn"] == found["bytes_bn"] == 0


def test_memory_is_what_the_backward_pass_needs():
    """Of y = x w for a w that learns, that is x; of twice as many rows, twice that."""
    small, large = torch.randn(8, 4), torch.randn(16, 4)
    linear = nn.Linear(4, 4, bias=False)
    weight = 4 * 4 * 4
    found = costs.kept({
        "bn": [lambda: linear(small.requires_grad_())],
        "twice": [lambda: linear(large.requires_grad_())],
        "parts": [lambda: linear(small), lambda: linear(small)],
    })  # fmt: skip
    assert found["memory_twice"] == pytest.approx((16 * 16 + weight) / (8 * 16 + weight))
    assert found["memory_parts"] == 1


def test_every_way_computes_on_the_same_samples_with_the_same_weights():
    x = torch.randn(8, 4, 3, 3)

    def make(norm):
        return costs.head(norm, width=4, depth=1, device=CPU)

    ways = costs.passes(make, x)
    assert [len(forwards) for forwards in ways.values()] == [1, 1, 2, 1, 1, 1]
    first, second = (forward() for forward in ways["accumulated"])
    assert torch.allclose(torch.cat([first, second])[:4], first)
    (plain,) = (forward() for forward in ways["bn"])
    (renormed,) = (forward() for forward in ways["renorm"])
    assert torch.allclose(plain, renormed, atol=1e-5)  # its limits begin at none
    (virtual,) = (forward() for forward in ways["virtual"])
    assert virtual.shape == plain.shape


def test_ratios_are_of_the_same_round():
    spent = []

    def spend(units):
        return lambda: spent.append(sum(range(units)))

    found = costs.in_turns({"base": spend(20_000), "long": spend(400_000)}, 5, "base", CPU)
    assert set(found) == {"long"}
    assert 4 < found["long"] < 100


def test_all_numbers_are_there(measure):
    found = measure("costs", *TINY)
    assert all(math.isfinite(value) and value >= 0 for value in found.values())
    assert found["other_population"] < 1e-4 < found["other_batch"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("task.width=6", "task.width=6: it must be a multiple of 4"),
        ("task.samples=6", "task.samples=6: it must be a multiple of 4"),
        ("task.ranks=1", "task.ranks=1: an exchange needs at least 2"),
        ("task.batches=9", "task.batches=9: an estimate takes an eighth"),
        ("task.rounds=0", "task.rounds=0: it is at least 1"),
    ],
)
def test_refusals(measure, override, says):
    with pytest.raises(ValueError, match=says) as refused:
        measure("costs", *TINY, override)
    assert "\n" not in str(refused.value)
