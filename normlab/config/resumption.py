"""A run that goes on with another number of ranks: the same run, as long as its batches are."""

from collections.abc import Collection
from typing import Any

from normlab import batchplan
from normlab.config.schema import ConfigError, plan_of

OF_THE_PLACE = (
    "world_size", "runs", "data_root", "launch", "max_restarts", "stall_timeout", "debug_sync",
    "checkpoint_every", "allocator", "tracker",
)  # fmt: skip
"""What may be said beside ``resume``: where and how a run is at work, not what it is."""


def check_resume(overrides: list[str]) -> None:
    """Refuse to say anew what a run is that is taken up again. Raises ConfigError."""
    named = keys(overrides)
    if "resume" not in named or "resume=null" in overrides:
        return
    for key, override in zip(named, overrides, strict=True):
        if key != "resume" and key not in OF_THE_PLACE:
            raise ConfigError(
                f"{override}: a run that is resumed stays what it was; beside resume= there may be"
                f" {', '.join(OF_THE_PLACE)}"
            )


def keys(overrides: list[str]) -> list[str]:
    """The key that each override names."""
    return [override.split("=")[0].lstrip("+~") for override in overrides]


def continued(
    recorded: dict[str, Any], asked: dict[str, Any], named: Collection[str] = OF_THE_PLACE
) -> dict[str, Any]:
    """The config of a recorded run that goes on where and with as many ranks as is asked.

    recorded: with the later keys. Of what may be said beside ``resume``, the keys that are `named`
    are taken from what is asked; the others stay as they were. Of the plans that form the same
    batches, one that also moves running statistics as before is taken, if there is one. One process
    had no use for ``buffers``: its ranks take ``mean``, which is what it has.

    Raises ConfigError if these cannot form the same batches: the same samples share statistics, in
    the same order, and a layer that would notice gets the same micro-batches.
    """
    config = recorded | {key: asked[key] for key in OF_THE_PLACE if key in named}
    before, size = plan_of(recorded), config["world_size"]
    if size == before.world_size:
        return config
    config |= {"nbs": before.nbs, "sync_group_size": None}
    config |= {"buffers": "mean"} if before.world_size == 1 else {}
    as_often = before.batch_size // max(1, size * before.accumulation)
    said, formed = "", []
    for micro_batch in (recorded["micro_batch"], None, before.micro_batch, as_often):
        planned = config | {"micro_batch": micro_batch}
        try:
            difference = _difference(before, plan_of(planned), recorded)
        except batchplan.PlanError as error:
            difference = str(error)
        if not difference:
            formed.append(planned)
        said = said or difference
    whole = f"world_size={size}: the run has world_size={before.world_size}, and"
    if not formed:
        raise ConfigError(f"{whole} its batches cannot be formed by other ranks: {said}")
    others = [other_statistics(recorded, planned) for planned in formed]
    if "" in others:
        return formed[others.index("")]
    if recorded["freeze_after"] is not None and recorded["freeze_statistics"] == "ema":
        raise ConfigError(f"{whole} the running statistics that it freezes: {others[0]}")
    return formed[0]


def other_statistics(recorded: dict[str, Any], config: dict[str, Any]) -> str:
    """Why running statistics become others in a run that goes on with this config, or "".

    Each forward moves them once, on each rank by its own batches, and ``buffers`` makes one of the
    ranks'. So they are the same where every forward has the samples that it had, and the ranks'
    are as linear in them as one process's.
    """
    before, after, norm = plan_of(recorded), plan_of(config), config["norm"]
    if before.world_size == after.world_size or before.batch == "none" or not _moving(norm):
        return ""
    if before.accumulation != after.accumulation:
        return f"{after.accumulation} forwards a step and not {before.accumulation}"
    if before.batch == "sync":
        groups = after.world_size // after.sync_group
        pooled = groups > 1 and config["buffers"] == "average"
        return f"buffers=average of {groups} groups, which may begin within an epoch" * pooled
    # From here on a forward has other chunks, on as many ranks.
    if before.accumulation > 1:
        return f"other chunks in each of {before.accumulation} forwards a step"
    if (population := norm.get("population", "mean")) != "mean":
        return f"norm.population={population} of other chunks"
    return "" if config["buffers"] == "mean" else f"buffers={config['buffers']} of other ranks"


def _difference(
    before: batchplan.BatchPlan, after: batchplan.BatchPlan, config: dict[str, Any]
) -> str:
    """What of a step would be another, or ""."""
    if before.virtual_extra != after.virtual_extra:
        return f"virtual_extra={after.virtual_extra} and not {before.virtual_extra}"
    norm = config["norm"]
    # Chunks that interleave are cut out of a micro-batch, and layers of their own see one alone.
    whole = norm.get("grouping") == "interleaved" or config["sync_layers"] is not None
    if whole and before.micro_batch != after.micro_batch:
        return f"micro_batch={after.micro_batch} and not {before.micro_batch}"
    if norm.get("module", norm["name"]) == "renorm" and _moving(norm):
        return "norm=renorm trains with running statistics, and each rank has its own"
    return ""


def _moving(norm: dict[str, Any]) -> bool:
    """Whether a norm that has running statistics moves them."""
    return norm.get("update") is not False and norm.get("statistics") != "population"
