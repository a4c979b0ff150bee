"""What a run measures after which epochs, what of it is missing, and what can be had no more.

A measurement is an evaluation of the trained network (``normlab.protocols``) or a probe, known by
its name (``normlab.probes``). Both are made after the same epochs; epoch 0 is before training.
"""

from typing import Any

from normlab.protocols import Protocol
from normlab.runs import RunDir
from normlab.tasks import CLASSIFIER

Measurement = Protocol | str
"""An evaluation, or the name of a probe; as text no two are the same."""

Due = tuple[int, Measurement]
"""After which epoch, and what."""


def protocols(config: dict[str, Any]) -> list[Protocol]:
    """The evaluations a config asks for."""
    return [Protocol.parse(spec) for spec in config["evals"]]


def epochs(config: dict[str, Any]) -> list[int]:
    """After which epochs a run is measured: the last ``eval_last`` and those of ``eval_at``; a run
    without any, as it begins."""
    end = config["epochs"]
    last = range(max(min(1, end), end - config["eval_last"] + 1), end + 1)
    return sorted({*last, *config["eval_at"]})


def wanted(config: dict[str, Any]) -> list[Due]:
    """What a run shall have in the end, by epoch. No training forward precedes the first epoch.

    A task has what it has measured, and nothing else.
    """
    if config["task"]["name"] != CLASSIFIER:
        return []
    measured: list[Measurement] = [*protocols(config), *config["probes"]]
    return [
        (epoch, one) for epoch in epochs(config) for one in measured if epoch or not _trained(one)
    ]


def missing(config: dict[str, Any], run: RunDir) -> list[Due]:
    """What a run asks for and has not measured, by epoch."""
    have = run.measured()
    return [(epoch, one) for epoch, one in wanted(config) if (str(one), epoch) not in have]


def left_to_one_process(config: dict[str, Any], run: RunDir) -> str:
    """What to say where ranks have ended a run and nobody waits for them to make its probes."""
    left = {one: None for _, one in missing(config, run) if isinstance(one, str)}
    if config["launch"] or not left or run.status()["status"] != "done":
        return ""
    return f"one process makes the probes ({', '.join(left)}): normlab train resume={run.path}"


def lost(config: dict[str, Any], run: RunDir, state: dict[str, Any]) -> list[Due]:
    """What is missing and a run can measure no more, by epoch; state: its checkpoint.

    It needs weights that were not kept, an EMA that was not tracked, or running statistics that
    other ranks have moved otherwise. What the training itself measured needs neither, and the
    weights of epoch 0 are made of the seed, or read, again.
    """
    position, tracked = state["position"], tracked_decays(state)

    def gone(epoch: int) -> bool:
        held = epoch == 0 or (epoch == position["epoch"] and position["step"] == 0)
        return epoch <= position["epoch"] and not held and not run.snapshot(epoch).exists()

    disturbed = _disturbed(config, run)
    return [
        (epoch, one)
        for epoch, one in missing(config, run)
        if (gone(epoch) and not _trained(one))
        or not {_decay(one)} <= {None, *tracked}
        or (epoch, one) in disturbed
    ]


def reading(config: dict[str, Any], run: RunDir) -> list[Due]:
    """What is missing and reads running statistics that the training's forwards have moved, by
    epoch. A probe may; frozen layers have others."""
    frozen = config["freeze_after"]
    return [
        (epoch, one)
        for epoch, one in missing(config, run)
        if (isinstance(one, str) or one.statistics == "ema")
        and 0 < epoch <= (config["epochs"] if frozen is None else frozen)
    ]


def _disturbed(config: dict[str, Any], run: RunDir) -> list[Due]:
    """What reads running statistics that are not those of the run as it began."""
    return reading(config, run) if run.env().get("other_statistics") else []


def tracked_decays(state: dict[str, Any]) -> list[float]:
    """The EMA bank that a checkpoint holds."""
    return list(state["ema_bank"]["decays"]) if state["ema_bank"] else []


def unobtainable(config: dict[str, Any], run: RunDir, state: dict[str, Any]) -> str:
    """In one line, what the config asks for and this run cannot give, and what to do; "" if all
    can be had. state: the run's checkpoint."""
    said = []
    tracked = tracked_decays(state)
    if not set(config["ema_bank"]) <= set(tracked):
        said.append(f"ema_bank={config['ema_bank']}: run {run.id} has tracked {tracked}")
    if disturbed := _disturbed(config, run):
        said.append(
            f"{disturbed[0][1]}: run {run.id} went on with other ranks, which moved the running"
            f" statistics otherwise ({run.env()['other_statistics']})"
        )
    untracked = set(config["ema_bank"]) - set(tracked)
    without = {
        epoch
        for epoch, one in lost(config, run, state)
        if _decay(one) not in untracked and (epoch, one) not in disturbed
    }
    if without:
        asked = "eval_at" if without <= set(config["eval_at"]) else "eval_last"
        said.append(
            f"{asked}={config[asked]}: run {run.id} has not kept the weights of"
            f" {_span(sorted(without))}, without which they cannot be evaluated"
        )
    anew = f"; delete {run.path} to train it anew, or give another runs="
    return ", and ".join(said) + anew if said else ""


def _span(at: list[int]) -> str:
    if len(at) == 1:
        return f"epoch {at[0]}"
    if at == list(range(at[0], at[-1] + 1)):
        return f"epochs {at[0]} to {at[-1]}"
    return f"epochs {', '.join(map(str, at))}"


def _trained(one: Measurement) -> bool:
    """Whether the training forward has measured it."""
    return isinstance(one, Protocol) and one.statistics == "augmented"


def _decay(one: Measurement) -> float | None:
    """Whose running average of the bank it reads."""
    return one.decay if isinstance(one, Protocol) else None
