"""The plan over ranks: every way to form the same batch, from the same samples."""

import itertools

import pytest

from normlab.batchplan import BatchPlan, PlanError, plan
from normlab.config import ConfigError, check, compose, identity, run_id

SIZES = (8, 24, 64, 96)
RANKS = (1, 2, 3, 4, 8)


def blocks(made: BatchPlan) -> set[frozenset[int]]:
    """The places of the SGD batch that share statistics."""
    found = set()
    for first in range(0, made.world_size, made.sync_group):
        members = [made.parts(rank) for rank in range(first, first + made.sync_group)]
        for together in zip(*members, strict=True):
            places = [place for part in together for place in part]
            size = made.nbs or len(places)
            starts = range(0, len(places), size)
            found |= {frozenset(places[start : start + size]) for start in starts}
    return found


@pytest.mark.parametrize("batch_size", SIZES)
@pytest.mark.parametrize("world_size", RANKS)
def test_every_way_that_divides_has_the_same_nbs_of_the_same_samples(
    batch_size: int, world_size: int
) -> None:
    """bn in micro-batches, ghost in chunks, sync over every size of group; and one process."""
    for nbs in range(2, batch_size + 1):
        if batch_size % (world_size * nbs):
            continue
        expected = {frozenset(range(start, start + nbs)) for start in range(0, batch_size, nbs)}
        groups = [None, *(g for g in RANKS if world_size % g == 0 and nbs % g == 0)]
        ways = [("per_rank", None), ("ghost", None), *(("sync", group) for group in groups)]
        for batch, group in ways:
            if group is not None and (batch_size // world_size) % (nbs // group):
                continue
            asked = {"world_size": world_size, "batch": batch, "sync_group_size": group}
            made = plan(batch_size, nbs, **asked)
            assert made.nbs == nbs
            assert made.sync_group == (group or made.sync_group)
            assert blocks(made) == expected


@pytest.mark.parametrize("batch", ["per_rank", "ghost", "sync", "none"])
def test_ranks_take_every_sample_once(batch: str) -> None:
    for batch_size, world_size, micro in itertools.product(SIZES, RANKS, (None, 2, 4)):
        nbs = 2 if batch == "ghost" else None
        try:
            made = plan(batch_size, nbs, world_size=world_size, batch=batch, micro_batch=micro)
        except PlanError:
            continue
        parts = [part for rank in range(world_size) for part in made.parts(rank)]
        assert sorted(place for part in parts for place in part) == list(range(batch_size))
        assert {len(part) for part in parts} == {made.micro_batch}
        assert len(parts) == world_size * made.accumulation


def test_ranks_of_a_group_take_turns() -> None:
    made = plan(32, 8, world_size=4, batch="sync", sync_group_size=2)
    assert [[part.start for part in made.parts(rank)] for rank in range(4)] == [
        [0, 8], [4, 12], [16, 24], [20, 28],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"sync_group_size": 3}, ["sync_group_size=3", "world_size=8", "2 or 4"]),
        ({"sync_group_size": 4, "nbs": 6}, ["nbs=6", "sync_group_size=4", "8 ranks"]),
        ({"sync_group_size": 2, "batch": "ghost", "nbs": 4}, ["sync_group_size=2", "norm=sync"]),
        ({"sync_group_size": 0}, ["sync_group_size=0", "at least 1"]),
    ],
)
def test_a_group_that_does_not_fit_is_refused(asked: dict, said: list[str]) -> None:
    with pytest.raises(PlanError) as refusal:
        plan(**{"batch_size": 64, "nbs": None, "world_size": 8, "batch": "sync"} | asked)
    for part in said:
        assert part in str(refusal.value)
    assert "\n" not in str(refusal.value)


# -- the identity of a run over ranks ----------------------------------------------------------


def known(*overrides: str) -> str:
    return run_id(compose(list(overrides)), device="cpu", data_digest="0123abcd", kernels=False)


def test_what_changes_nothing_changes_no_id() -> None:
    """The plan says the size of a group; one rank, and norms without statistics, agree on none."""
    ranks = ["norm=sync", "nbs=32", "world_size=4", "batch_size=64"]
    assert known(*ranks, "sync_group_size=2") == known(*ranks)
    assert known(*ranks, "debug_sync=true") == known(*ranks)
    assert known("buffers=mean") == known()
    assert known("norm=gn", "world_size=2", "buffers=mean") == known("norm=gn", "world_size=2")


def test_what_changes_the_training_changes_the_id() -> None:
    ranks = ["norm=sync", "nbs=32", "world_size=4", "batch_size=64"]
    made = [
        known(*ranks), known(*ranks, "sync_group_size=4"), known(*ranks, "buffers=mean"),
        known(*ranks, "sync_layers=norm1"), known(*ranks[:2], *ranks[3:], "world_size=2"),
    ]  # fmt: skip
    assert len(set(made)) == len(made)


def test_a_config_from_before_ranks_is_completed() -> None:
    later = ("sync_group_size", "sync_layers", "buffers", "debug_sync")
    now = compose(["norm=gn"])
    old = {key: value for key, value in now.items() if key not in later}
    assert identity.with_later_keys(old) == now


def test_layers_to_synchronize_are_for_sync() -> None:
    with pytest.raises(ConfigError, match="sync_layers=a says which layers of norm=sync"):
        check(compose(["norm=bn", "sync_layers=a"]))
