"""Four ranks train one run, and it is the run of one process (P29, P34, P35, K8, E21)."""

import pytest
import torch
import whole

EVALS = "evals=[train:batch,val:batch,val:ema,val:precise,val:precise_mean]"

ROUTES = {
    # name: how four ranks form the batch, how one process does, and whether buffers agree, too
    "per rank": (["norm=bn", "nbs=16", "ema_bank=[0.5]"], ["norm=ghost", "nbs=16"], True),
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
