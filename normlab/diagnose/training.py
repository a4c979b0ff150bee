"""What the training left: the optimizer's groups, and the checkpoints of its ranks."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normlab.diagnose.case import Case
from normlab.diagnose.findings import RECALIBRATE, Finding
from normlab.population.ema import ema_noise

__all__ = ["ranks", "weight_decay"]


def weight_decay(case: Case) -> Iterator[Finding]:
    """Weight decay that reached the norms' weight and bias.

    An optimizer's state knows parameters by number, or by name (`param_names`). By number: a norm's
    are vectors, and where more vectors decay than the model has others, norms' are among them.
    """
    groups = list(case.optimizer["param_groups"]) if case.optimizer else []
    owned = {
        f"{name}.{key}" if name else key: p
        for name, norm in case.norms.items()
        for key, p in norm._parameters.items()
        if p is not None
    }
    decayed = [group for group in groups if float(group.get("weight_decay", 0)) > 0]
    if not decayed or not owned:
        return
    names = [n for group in decayed for n in group.get("param_names", ())]
    if names:
        reached = len(owned.keys() & set(names))
    else:
        reached = _vectors(case.model, groups, decayed, case.optimizer or {}, len(owned))
    if not reached:
        return
    decay = max(float(group["weight_decay"]) for group in decayed)
    yield Finding(
        "weight_decay_on_norm", "notice", list(case.norms),
        f"Weight decay {decay:g} reached {reached} of the {len(owned)} weights and biases of batch "
        "norms: it pulls their scales to 0, and nothing of the function needs that.",
        {"weight decay": decay, "parameters": reached, "of": len(owned)},
        "a group of parameters of its own with `weight_decay=0` for vectors (`p.dim() < 2`)",
    )  # fmt: skip


def _vectors(
    model: nn.Module,
    groups: list[Mapping[str, Any]],
    decayed: list[Mapping[str, Any]],
    optimizer: Mapping[str, Any],
    owned: int,
) -> int:
    """How many of the norms' parameters decay at least."""
    parameters = list(model.parameters())
    if len(groups) == 1 and len(groups[0]["params"]) == len(parameters):
        return owned
    others = sum(p.dim() < 2 for p in parameters) - owned
    state = optimizer.get("state", {})
    vectors = 0
    for place in (place for group in decayed for place in group["params"]):
        kept = [v for v in state.get(place, {}).values() if isinstance(v, Tensor) and v.dim() > 0]
        vectors += bool(kept) and kept[0].dim() == 1
    return min(max(vectors - others, 0), owned)


def ranks(case: Case) -> Iterator[Finding]:
    """Checkpoints of one network, as ranks write them, whose statistics differ."""
    own = dict(case.model.named_parameters())
    same = [
        state for state in case.states
        if all(n in state and torch.equal(p.detach().cpu(), state[n].cpu()) for n, p in own.items())
    ]  # fmt: skip
    if not same:
        return
    apart: dict[str, float] = {}
    for name, pair in case.pairs.items():
        key = f"{name}.running_mean" if name else "running_mean"
        held = [state[key].double().to(pair.mean.device) for state in same if key in state]
        means = torch.stack([pair.mean, *held])
        if not held or pair.moments.groups.count < 2:
            continue
        var = pair.precise_var.clamp_min(1e-30)
        spread = (pair.moments.groups.var / var)[pair.mask].mean()
        apart[name] = float((means.var(0) / var)[pair.mask].mean() / spread)
    if not apart or max(apart.values()) == 0:
        return
    names = sorted(apart, key=lambda name: -apart[name])
    middle = sorted(apart.values())[len(apart) // 2]
    momentum = getattr(case.norms[names[0]], "momentum", None) or 0.1
    usual = ema_noise(1 - momentum) if 0 < momentum <= 1 else 1.0
    far = middle > OF_RANKS * usual
    yield Finding(
        "ranks_disagree", "problem" if far or case.stored_costs else "notice", names,
        f"{len(same) + 1} checkpoints have the same weights and other statistics: their means "
        f"scatter by {middle:.2f} of the variance of one batch's mean ({usual:.2f} is what an "
        f"average of momentum {momentum:g} scatters); {case.said()}.",
        {"checkpoints": len(same) + 1, "scatter": middle, "usual": usual, **case.in_numbers()},
        f"{RECALIBRATE} over all ranks' data (torchrun), or broadcast rank 0's before saving",
    )  # fmt: skip


OF_RANKS = 4.0
"""Times the scatter of independent averages: ranks then do not see draws of the same data."""
