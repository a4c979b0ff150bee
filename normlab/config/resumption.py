"""A run that goes on with another number of ranks: the same run, as long as its batches are."""

from collections.abc import Collection
from typing import Any

from normlab import batchplan
from normlab.config.schema import ConfigError, plan_of

OF_THE_PLACE = (
    "world_size", "runs", "data_root", "launch", "max_restarts", "stall_timeout", "debug_sync",
    "checkpoint_every", "allocator",
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
    are taken from what is asked; the others stay as they were.

    Raises ConfigError if these cannot form the same batches: the same samples share statistics, in
    the same order, and a layer that would notice gets the same micro-batches.
    """
    config = recorded | {key: asked[key] for key in OF_THE_PLACE if key in named}
    before, size = plan_of(recorded), config["world_size"]
    if size == before.world_size:
        return config
    said = ""
    for micro_batch in dict.fromkeys((recorded["micro_batch"], None, before.micro_batch)):
        planned = config | {"nbs": before.nbs, "micro_batch": micro_batch, "sync_group_size": None}
        try:
            difference = _difference(before, plan_of(planned), recorded)
        except batchplan.PlanError as error:
            said = said or str(error)
            continue
        if not difference:
            return planned
        said = said or difference
    raise ConfigError(
        f"world_size={size}: the run has world_size={before.world_size}, and its batches cannot be"
        f" formed by other ranks: {said}"
    )


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
    # Batch Renorm counts its forwards, and its limits grow with them.
    if norm.get("module", norm["name"]) == "renorm" and before.accumulation != after.accumulation:
        return f"{after.accumulation} forwards a step and not {before.accumulation}"
    return ""
