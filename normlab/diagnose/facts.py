"""What buffers, modes and momenta are, whatever the data: defects that need no measurement."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from normlab.diagnose.case import Case
from normlab.diagnose.findings import RECALIBRATE, Finding, Severity
from normlab.diagnose.live import norms_of
from normlab.diagnose.thresholds import NEGLIGIBLE
from normlab.norms.base import PopulationNorm

__all__ = ["buffers", "short_memory", "some", "structure", "untouched"]


def some(names: list[str]) -> str:
    """For a sentence: 'conv1' or '3 layers, the first bn1'."""
    return names[0] if len(names) == 1 else f"{len(names)} layers ({names[0]} first)"


def _statistics(norm: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    return norm._buffers.get("running_mean"), norm._buffers.get("running_var")


def _is_frozen(norm: nn.Module) -> bool:
    """Whether its statistics are constants by its class or its owner's choice."""
    if isinstance(norm, PopulationNorm):
        return norm.frozen
    return not isinstance(norm, nn.modules.batchnorm._BatchNorm)


def untouched(model: nn.Module) -> set[str]:
    """Layers with mean exactly 0 and variance exactly 1."""
    found = set()
    for name, norm in norms_of(model).items():
        mean, var = _statistics(norm)
        if mean is not None and var is not None and not mean.any() and bool((var == 1).all()):
            found.add(name)
    return found


def _momentum(norm: nn.Module) -> float | None:
    momentum: Any = getattr(norm, "momentum", None)
    return None if momentum is None else float(momentum)


_DEFECTS = {
    "not_finite": "hold NaN or infinity: outputs are NaN in eval()",
    "negative_variance": "hold a variance below 0, as E[x^2] - E[x]^2 in float32 gives: outputs "
    "are NaN in eval()",
    "zeroed": "have mean 0 and variance 0, an estimate over no batches: inputs are divided by "
    "sqrt(eps)",
}


def _defect(mean: Tensor, var: Tensor) -> str | None:
    if not bool(torch.isfinite(mean).all() and torch.isfinite(var).all()):
        return "not_finite"
    if bool((var < 0).any()):
        return "negative_variance"
    return None if bool(mean.any() or var.any()) else "zeroed"


def buffers(case: Case) -> Iterator[Finding]:
    """Defects of the buffers; notes them in `case.broken`."""
    reached = {name: norm for name, norm in case.norms.items() if name in case.moments}
    kinds: dict[str, list[str]] = {kind: [] for kind in _DEFECTS}
    for name, norm in reached.items():
        mean, var = _statistics(norm)
        kind = _defect(mean, var) if mean is not None and var is not None else None
        if kind is not None:
            kinds[kind].append(name)
    for kind, names in kinds.items():
        if names:
            yield Finding(
                kind, "problem", names, f"The statistics of {some(names)} {_DEFECTS[kind]}.",
                {"layers": len(names), "of": len(case.norms)}, RECALIBRATE,
            )  # fmt: skip
    new = [name for name in reached if name in untouched(case.model)]
    stopped = [name for name in new if _momentum(case.norms[name]) == 0]
    never = [name for name in new if name not in stopped]
    if never:
        counted = max((_count(case.norms[name]) or 0 for name in never), default=0)
        yield Finding(
            "never_updated", "problem", never,
            f"The statistics of {some(never)} are those of a new layer, mean 0 and variance 1, "
            f"with num_batches_tracked {counted}: {case.said()}.",
            {"layers": len(never), "of": len(case.norms), "num_batches_tracked": counted},
            RECALIBRATE,
        )  # fmt: skip
    if stopped:
        yield _without_momentum(stopped, "problem", "are still mean 0 and variance 1")
    if moved := _stopped(case, stopped):
        yield _without_momentum(moved, "notice", "never move")
    case.broken |= {name for names in kinds.values() for name in names} | {*never, *stopped}


def _without_momentum(names: list[str], severity: Severity, still: str) -> Finding:
    return Finding(
        "momentum_zero", severity, names,
        f"momentum is 0 in {some(names)}: its statistics {still} (torch's momentum is the share of "
        "the new batch).",
        {"momentum": 0.0, "layers": len(names)},
        f"{RECALIBRATE}; and `momentum=0.1` before training goes on",
    )  # fmt: skip


def _stopped(case: Case, found: list[str]) -> list[str]:
    return [
        name for name, norm in case.norms.items()
        if _momentum(norm) == 0 and name not in found and _statistics(norm)[0] is not None
    ]  # fmt: skip


def short_memory(case: Case) -> Iterator[Finding]:
    """A momentum that averages over no more than two batches, whatever came of it."""
    names = [name for name, norm in case.norms.items() if (_momentum(norm) or 0) >= 0.5]
    if names:
        momentum = max(_momentum(case.norms[name]) or 0 for name in names)
        yield Finding(
            "momentum_reversed", "notice", names,
            f"momentum is {momentum:g} in {some(names)}: its statistics hold the last "
            f"{1 / momentum:.1f} batches (torch's momentum is the share of the new batch).",
            {"momentum": momentum, "time constant in updates": 1 / momentum},
            f"`momentum=0.1` in torch is what others call 0.9; {RECALIBRATE}",
        )  # fmt: skip


def _count(norm: nn.Module) -> int | None:
    counted = norm._buffers.get("num_batches_tracked")
    return None if counted is None else int(counted)


def structure(case: Case) -> Iterator[Finding]:
    """How the layers are set, used and trained."""
    norms, live = case.norms, case.live
    off = [n for n, m in norms.items() if _statistics(m)[0] is None and not _is_own_choice(m)]
    if off:
        yield Finding(
            "no_running_statistics", "problem", off,
            f"{some(off)} {'has' if len(off) == 1 else 'have'} no running statistics "
            "(track_running_stats=False): a prediction depends on the batch it is made in.",
            {"layers": len(off), "of": len(norms)},
            "make the model with `track_running_stats=True`, load the weights, then " + RECALIBRATE,
        )  # fmt: skip
    uses = Counter(live.uses) if live else Counter()
    never = [
        n for n in norms if n not in case.moments and not uses[n] and n in case.forwards.layers
    ]
    if never:
        yield Finding(
            "never_used", "notice", never,
            f"A forward does not reach {some(never)}, in train() or in eval().",
            {"layers": len(never)}, "remove the layers, or call them",
        )  # fmt: skip
    yield from _frozen_but_updating(case)
    yield from _counts(case, uses)
    dead = {name: _dead(case, name) for name in case.moments}
    dead = {name: n for name, n in dead.items() if n}
    if dead:
        names = sorted(dead, key=lambda name: -dead[name])
        total = sum(len(m.samples.mean) for m in case.moments.values())
        yield Finding(
            "dead_channels", "notice", names,
            f"{sum(dead.values())} of {total} channels have a variance below {NEGLIGIBLE:g} of "
            f"eps, most of them in {names[0]}: what is left of their signal is divided by "
            "sqrt(eps), not by its deviation.",
            {"channels": sum(dead.values()), "of": total, f"in {names[0]}": dead[names[0]]},
            "prune them, or look for what silenced them (a learning rate, a ReLU)",
        )  # fmt: skip
    if live and live.biases:
        pairs = live.biases
        yield Finding(
            "bias_before_norm", "notice", list(pairs),
            f"{len(pairs)} layers add a bias that the batch norm behind them subtracts again "
            f"({next(iter(pairs.values()))} first): parameters that learn nothing.",
            {"layers": len(pairs)}, "`bias=False` in the layers before a norm",
        )  # fmt: skip
    yield from _fused(case)


def _is_own_choice(norm: nn.Module) -> bool:
    return isinstance(norm, PopulationNorm)


def _dead(case: Case, name: str) -> int:
    layer = case.forwards.layers[name]
    return int((case.moments[name].statistics().var < NEGLIGIBLE * layer.eps).sum())


def _frozen_but_updating(case: Case) -> Iterator[Finding]:
    if case.live is None:
        return
    names = []
    for name, norm in case.norms.items():
        own = [p for p in norm._parameters.values() if p is not None]
        if own and not any(p.requires_grad for p in own) and name in case.live.moved:
            names.append(name)
    if not names:
        return
    learns = any(p.requires_grad for p in case.model.parameters())
    yield Finding(
        "frozen_but_updating", "problem" if learns else "notice", names,
        f"{some(names)}: weight and bias have requires_grad=False, but a forward in train() moves "
        "the statistics: frozen layers that drift.",
        {"layers": len(names), "other parameters learn": str(learns)},
        '`normlab.convert(model, "frozen")`, which no train() thaws',
    )  # fmt: skip


def _counts(case: Case, uses: Counter[str]) -> Iterator[Finding]:
    live = case.live
    again = [name for name in case.norms if live and live.again[name]]
    if again:
        yield Finding(
            "double_update", "problem", again,
            f"A backward pass moves the statistics of {some(again)} once more (activation "
            "checkpointing runs the forward again): the decay is squared.",
            {"layers": len(again), "of": len(case.norms)},
            "`momentum = 1 - sqrt(1 - momentum)` in these layers, or `normlab.convert(model, "
            '"bn")`, which knows a recomputation',
        )  # fmt: skip
        return
    counts = {}
    for name, norm in case.norms.items():
        count = _count(norm)
        used = max(uses[name], 1)
        if count and not _is_frozen(norm) and count % used == 0:
            counts[name] = count // used
    if len(set(counts.values())) < 2:
        return
    least = min(counts.values())
    doubled = [name for name, count in counts.items() if count == 2 * least]
    if len(doubled) + sum(count == least for count in counts.values()) == len(counts):
        yield Finding(
            "double_update", "problem", doubled,
            f"{some(doubled)} counted {2 * least} updates and the other layers {least}: two for "
            "each step, as activation checkpointing makes them; their decay was squared.",
            {"layers": len(doubled), "updates": 2 * least, "of the others": least},
            f"{RECALIBRATE}; in training `momentum = 1 - sqrt(1 - momentum)` where a forward is "
            "recomputed",
        )  # fmt: skip
        return
    most = max(counts, key=lambda name: counts[name])
    yield Finding(
        "counts_differ", "notice", [most],
        f"Layers count from {least} to {counts[most]} updates (num_batches_tracked): parts of the "
        "model were trained, or frozen, for other times.",
        {"least": least, "most": counts[most]}, "",
    )  # fmt: skip


def _fused(case: Case) -> Iterator[Finding]:
    """An identity that is called like a norm, after a layer with a bias: `fuse` leaves that."""
    names = []
    last: nn.Module | None = None
    for name, module in case.model.named_modules():
        own = name.rsplit(".", 1)[-1].lower()
        called = type(module).__name__ == "FoldedNorm" or (
            isinstance(module, nn.Identity) and ("bn" in own or "norm" in own)
        )
        behind = isinstance(last, nn.modules.conv._ConvNd | nn.Linear) and last.bias is not None
        if called and behind:
            names.append(name)
        if not list(module.children()):
            last = module
    if names:
        yield Finding(
            "fused_layers", "notice", names,
            f"{some(names)} {'is' if len(names) == 1 else 'are'} an identity behind a layer with a "
            "bias: folded norms, whose statistics can be neither estimated nor adapted.",
            {"layers": len(names), "norms left": len(case.norms)},
            "diagnose the checkpoint from before the fusion (`normlab.surgery.unfuse` takes back "
            "normlab's own)",
        )  # fmt: skip
    if not case.norms:
        yield Finding(
            "no_batch_norm", "notice", [],
            f"{type(case.model).__name__} has no batch norm: nothing depends on statistics.",
        )  # fmt: skip
