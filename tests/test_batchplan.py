"""The batch plan: its arithmetic against the definition of NBS, and its refusals against itself."""

from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normlab.batchplan import BATCHES, BatchPlan, PlanError, plan, steps

# Products of small primes, so that many cases work; the rest is drawn freely, so that many do not.
SMOOTH = st.lists(st.sampled_from([1, 2, 2, 3, 5]), max_size=7).map(
    lambda factors: [f := 1, *(f := f * x for x in factors)][-1]
)
SIZE = st.one_of(SMOOTH, st.integers(-1, 1100))
RANKS = st.one_of(SMOOTH.filter(lambda n: n < 20), st.integers(-1, 9))


@st.composite
def arguments(draw: st.DrawFn) -> dict[str, object]:
    return {
        "batch_size": draw(SIZE),
        "nbs": draw(st.none() | SIZE),
        "world_size": draw(RANKS),
        "batch": draw(st.sampled_from(BATCHES)),
        "micro_batch": draw(st.none() | SIZE),
    }


@settings(max_examples=1500, deadline=None)
@given(arguments())
def test_a_plan_multiplies_back_or_the_refusal_offers_what_works(asked: dict) -> None:
    try:
        planned = plan(**asked)
    except PlanError as refusal:
        text = str(refusal)
        assert "\n" not in text
        for key, values in refusal.choices.items():
            for value in values:
                plan(**asked | {key: value})  # a choice that is refused too fails here
                assert str(value) in text
        return
    assert planned.batch_size == asked["batch_size"]
    assert planned.batch_size == planned.world_size * planned.accumulation * planned.micro_batch
    if asked["micro_batch"] is not None:
        assert planned.micro_batch == asked["micro_batch"]
    if planned.batch == "none":
        assert planned.nbs is None
        return
    assert planned.nbs is not None
    assert planned.nbs >= 2
    assert asked["nbs"] in (None, planned.nbs)
    assert planned.world_size % planned.sync_group == 0
    shared = planned.micro_batch * planned.sync_group
    assert shared % planned.ghost_chunks == 0
    assert planned.nbs == shared // planned.ghost_chunks + planned.virtual_extra


@settings(max_examples=500, deadline=None)
@given(arguments(), st.integers(-1, 3000), st.sampled_from(["drop", "error"]))
def test_no_step_of_an_epoch_has_another_size(asked: dict, n: int, remainder: str) -> None:
    """P7: for any numbers; at least one step, or a refusal."""
    try:
        planned = plan(**asked)
    except PlanError:
        return
    if n < planned.batch_size or (remainder == "error" and n % planned.batch_size):
        with pytest.raises(PlanError) as refused:
            steps(n, planned, remainder)
        assert str(n) in str(refused.value)
        assert f"batch_size={planned.batch_size}" in str(refused.value)
        for size in refused.value.choices["batch_size"]:
            again = plan(**asked | {"batch_size": size})
            assert steps(n, again, remainder)[0] >= 1
        return
    count, dropped = steps(n, planned, remainder)
    assert count >= 1
    assert 0 <= dropped < planned.batch_size
    assert count * planned.batch_size + dropped == n
    assert dropped == 0 or remainder == "drop"


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        # micro_batch, accumulation, ghost_chunks, sync_group, virtual_extra, nbs
        ({"batch_size": 128, "nbs": None}, (128, 1, 1, 1, 0, 128)),
        ({"batch_size": 1024, "nbs": 32, "world_size": 8}, (32, 4, 1, 1, 0, 32)),
        ({"batch_size": 128, "nbs": 32, "batch": "ghost"}, (128, 1, 4, 1, 0, 32)),
        ({"batch_size": 128, "nbs": 16, "batch": "ghost", "micro_batch": 32}, (32, 4, 2, 1, 0, 16)),
        ({"batch_size": 128, "nbs": None, "micro_batch": 64}, (64, 2, 1, 1, 0, 64)),
        ({"batch_size": 256, "nbs": None, "world_size": 8, "batch": "sync"}, (32, 1, 1, 8, 0, 256)),
        ({"batch_size": 256, "nbs": 64, "world_size": 8, "batch": "sync"}, (32, 1, 1, 2, 0, 64)),
        ({"batch_size": 256, "nbs": 16, "world_size": 8, "batch": "sync"}, (16, 2, 1, 1, 0, 16)),
        ({"batch_size": 32, "nbs": 48, "batch": "virtual"}, (32, 1, 1, 1, 16, 48)),
        ({"batch_size": 32, "nbs": 20, "batch": "virtual"}, (16, 2, 1, 1, 4, 20)),
        ({"batch_size": 96, "nbs": None, "batch": "none", "world_size": 2}, (48, 1, 1, 1, 0, None)),
    ],
)
def test_a_step_is_taken_apart(asked: dict, expected: tuple[int | None, ...]) -> None:
    got = plan(**asked)
    assert (
        got.micro_batch,
        got.accumulation,
        got.ghost_chunks,
        got.sync_group,
        got.virtual_extra,
        got.nbs,
    ) == expected


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"batch_size": 128, "nbs": 48}, ["nbs=48", "batch_size=128", "32 or 64"]),
        ({"batch_size": 128, "nbs": 256}, ["nbs=256", "batch_size=128", "nbs=128"]),
        ({"batch_size": 100, "nbs": None, "world_size": 3}, ["world_size=3", "batch_size=100"]),
        ({"batch_size": 64, "nbs": 16, "world_size": 8}, ["nbs=16", "8 samples per rank", "64"]),
        ({"batch_size": 64, "nbs": 1}, ["nbs=1", "instance norm"]),
        ({"batch_size": 8, "nbs": None, "world_size": 8}, ["nbs=1", "batch_size=8", "instance"]),
        ({"batch_size": 64, "nbs": None, "batch": "ghost", "norm": "ghost"}, ["ghost", "nbs"]),
        ({"batch_size": 64, "nbs": 8, "batch": "none", "norm": "gn"}, ["norm=gn", "nbs=8"]),
        ({"batch_size": 64, "nbs": 8, "micro_batch": 16}, ["micro_batch=16", "nbs=8"]),
        (
            {"batch_size": 64, "nbs": 16, "batch": "ghost", "micro_batch": 8},
            ["micro_batch=8", "nbs=16"],
        ),
        ({"batch_size": 64, "nbs": 4, "batch": "virtual", "micro_batch": 8}, ["nbs=4", "=8"]),
        ({"batch_size": 64, "nbs": 48, "batch": "sync", "world_size": 4}, ["nbs=48", "4 ranks"]),
        ({"batch_size": 64, "nbs": 8, "batch": "chunky"}, ["chunky", "per_rank, ghost"]),
        ({"batch_size": 0, "nbs": None}, ["batch_size=0", "at least 1"]),
        ({"batch_size": 64, "nbs": 0}, ["nbs=0", "at least 2"]),
        ({"batch_size": 64, "nbs": -4}, ["nbs=-4", "at least 2"]),
        ({"batch_size": 10**23, "nbs": 7}, ["batch_size=1000", "at most 2147483647"]),
        ({"batch_size": 64, "nbs": 10**23}, ["nbs=1000", "at most 2147483647"]),
        ({"batch_size": 2**31 - 1, "nbs": 7}, ["nbs=7 does not divide", "nbs=2147483647"]),
        ({"batch_size": 8, "nbs": None, "world_size": 0}, ["world_size=0"]),
    ],
)
def test_a_refusal_names_both_numbers(asked: dict, said: list[str]) -> None:
    with pytest.raises(PlanError) as refusal:
        plan(**asked)
    for part in said:
        assert part in str(refusal.value)


def test_a_remainder_is_dropped_or_refused_and_never_a_smaller_batch() -> None:
    """P6: refused before the first epoch, not at its end."""
    # 1000 = 3 * 333 + 1: the last batch of one sample that torch's BatchNorm stumbles over.
    planned = plan(333, None)
    assert steps(1000, planned) == (3, 1)
    with pytest.raises(PlanError, match=r"batch_size=333 leaves 1 of 1000"):
        steps(1000, planned, "error")
    with pytest.raises(PlanError, match=r"batch_size=333 is more than the 100"):
        steps(100, planned)
    with pytest.raises(PlanError, match="remainder must be drop or error"):
        steps(1000, planned, "keep")


@pytest.mark.parametrize(
    ("asked", "n", "remainder", "works"),
    [
        # The statistics of bn are the whole batch's unless an nbs is asked for: any size would do.
        ({"batch_size": 2000, "nbs": None}, 997, "drop", [997]),
        ({"batch_size": 333, "nbs": None}, 1000, "error", [250, 500]),
        ({"batch_size": 2000, "nbs": 8}, 997, "drop", [992]),
        ({"batch_size": 2048, "nbs": None, "micro_batch": 64}, 997, "drop", [960]),
        ({"batch_size": 300, "nbs": None, "micro_batch": 100}, 1000, "error", [200, 500]),
        ({"batch_size": 2048, "nbs": 8, "batch": "ghost", "micro_batch": 64}, 997, "drop", [960]),
    ],
)
def test_another_batch_size_is_offered_that_fits_what_was_asked(
    asked: dict, n: int, remainder: str, works: list[int]
) -> None:
    with pytest.raises(PlanError) as refusal:
        steps(n, plan(**asked), remainder)
    assert refusal.value.choices == {"batch_size": works}
    for size in works:
        steps(n, plan(**asked | {"batch_size": size}), remainder)


def test_rows_show_what_the_way_of_forming_uses() -> None:
    keys = [key for key, _, _ in plan(128, 32, batch="ghost").rows()]
    assert keys == [
        "batch_size",
        "world_size",
        "accumulation",
        "micro_batch",
        "ghost_chunks",
        "nbs",
    ]
    assert plan(8, None, batch="none").rows()[-1][:2] == ("nbs", "-")


def test_a_plan_does_not_change() -> None:
    planned: BatchPlan = plan(8, None)
    with pytest.raises(FrozenInstanceError):
        planned.nbs = 4  # type: ignore[misc]
