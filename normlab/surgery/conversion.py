"""Other norms in the place of a model's own, and back: `convert` and `revert`."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import nn

from normlab.norms import find
from normlab.norms._hooks import move_hooks
from normlab.norms.base import PopulationNorm, SampleNorm, check_update, complement
from normlab.norms.frozen import FrozenBatchNorm
from normlab.norms.none import NoNorm
from normlab.surgery._kinds import (
    BATCH,
    FROZEN,
    WITH_ACTIVATION,
    base_type,
    features,
    is_own,
    path,
)
from normlab.surgery._transplant import (
    ORIGIN,
    STATISTICS,
    Origin,
    group_of,
    hand_over,
    origin_of,
    save_as,
    shell,
    tensors,
    thaw,
    with_activation,
)

__all__ = ["convert", "revert"]

Choice = Callable[[str, nn.Module], bool]


def convert(
    model: nn.Module,
    norm: str | type[nn.Module],
    *,
    only: Choice | None = None,
    unknown: Literal["refuse", "keep"] = "refuse",
    lossy: bool = False,
    **options: Any,
) -> nn.Module:
    """Put `norm` in the place of every batch and group norm of `model`, in place.

        convert(torchvision.models.resnet50(), "ghost", nbs=32)

    Converted are torch's BatchNorm1d/2d/3d, SyncBatchNorm and GroupNorm, torchvision's
    FrozenBatchNorm2d, timm's batch norms with an activation (which stays), and normlab's own.
    Torch's instance and layer norms are not batch norms and stay, with or without statistics.

    What a layer was, its successor is: the same Parameter objects (an optimizer goes on with them),
    the same values under the same state_dict keys, training, requires_grad, dtype, device, eps and
    decay (round(1 - momentum, 12)), the same hooks with working handles, the same parametrizations;
    a module at two places stays one. Buffers are copied. A batch norm without running statistics
    keeps to its batches (statistics="batch", update=False, no new state_dict key), and is equal up
    to rounding, not to the bit; torchvision's frozen weights become parameters without gradient.
    norm="frozen" freezes the weights too, unless affine="trainable"; what it froze thaws with the
    next conversion. A SyncBatchNorm's group of ranks goes to a norm that takes one, and waits where
    a norm has no place for it for one that has. References outside the module tree (a Python list
    of layers) are not followed.

    Code that asks isinstance(m, nn.BatchNorm2d) does not see the new layers: a train() that freezes
    batch norms so stops freezing them (norm="frozen" does that), and
    torch.optim.swa_utils.update_bn does nothing (`normlab.population.estimate` and `apply` do).
    What they are is `normlab.norms.PopulationNorm`, or SampleNorm. torch.fx cannot trace into them;
    its tracers take them as leaves (`leaf_modules` in torchvision's create_feature_extractor).

    Args:
        model: changed in place; all of it is checked before anything is.
        norm: a name of `normlab.norms.names()`, or a class with that signature.
        only: called with name and module; those for which it is false stay.
        unknown: what happens to other classes that hold running statistics, subclasses above all,
            which may do more than normalize: "refuse", naming class and place, or "keep" them.
        lossy: allow what cannot carry over: statistics that `norm` has no place for are dropped,
            those that the old layer lacks start at mean 0 and variance 1, and so with the weights.
        options: of `norm`, such as nbs; eps and decay are the old layer's unless given.

    Returns the model, or the new layer where the model is a norm itself. Raises ValueError for the
    above, for a model without a norm to convert, for a torch class as `norm`, for an option that
    `norm` does not have or needs, for momentum 0 (torch's statistics that never move) or None
    (cumulative) where `norm` has no such decay, for eps=0, which torch takes in eval() alone (give
    another: eps=1e-5), for TorchScript, and for a model inside DistributedDataParallel, which holds
    the old buffers: convert before wrapping.
    """
    # `in` cannot name a module: it is the one norm that configurations call by another name.
    cls = find("instance" if norm == "in" else norm) if isinstance(norm, str) else norm
    accepted = _options(cls)
    if "momentum" in accepted and "decay" not in accepted:
        raise ValueError(
            f"{cls.__qualname__} takes momentum, not normlab's decay: convert makes normlab's "
            "norms and classes with their signature (norm='sync' for SyncBatchNorm), revert torch's"
        )
    for name in options:
        if name not in accepted:
            known = ", ".join(sorted(accepted)) or "none"
            raise ValueError(f"{cls.__name__} has no option {name!r}; it has: {known}")
    new = {}
    frozen = {}
    for name, old in _norms(model, only, unknown):
        try:
            new[old], frozen[old] = _successor(old, cls, options, accepted)
            _refuse_loss(old, new[old], lossy)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name or 'the model'} ({type(old).__name__}): {error}") from error
    if not new and unknown == "refuse":
        where = type(model).__name__ + " where `only` is true" * (only is not None)
        raise ValueError(f"there is no batch or group norm to convert in {where}")
    return _replace(model, new, frozen)


def revert(
    model: nn.Module, *, dims: int | None = None, lossy: bool = False, only: Choice | None = None
) -> nn.Module:
    """Put torch's layers in the place of normlab's in `model`, in place.

    A layer that `convert` made becomes the class that it was made of, with all that it was and with
    today's values: a round trip is the identity, to the bit. Other layers of normlab become
    nn.BatchNorm1d/2d/3d by `dims`, the positions' dimensions, which they do not know themselves;
    a SyncBatchNorm torch's, the group norms nn.GroupNorm, NoNorm nn.Identity. A frozen layer thaws:
    torch's follows train() and eval(). A model without layers of normlab stays as it is.

    Args:
        model: changed in place; all of it is checked before anything is.
        dims: 1, 2 or 3, for batch norms that did not come from `convert`.
        lossy: allow statistics that start anew, since the layer has none, and choices that torch's
            layer does not know (`statistics`, `update`, `group_size`).
        only: called with name and module; those for which it is false stay.

    Returns and raises as `convert`; a layer without a torch counterpart is refused by name.
    """
    if dims not in (None, 1, 2, 3):
        raise ValueError(f"dims is 1, 2 or 3, not {dims!r}")
    new = {}
    for name, old in _norms(model, only, "keep"):
        if origin_of(old) is None and not is_own(old):
            continue
        try:
            new[old] = _torch_layer(old, dims, lossy)
            _refuse_loss(old, new[old], lossy)
        except ValueError as error:
            raise ValueError(f"{name or 'the model'} ({type(old).__name__}): {error}") from error
    return _replace(model, new)


# -- what is a norm -------------------------------------------------------------------------------


def _is_known(module: nn.Module) -> bool:
    return (
        base_type(module) in (*BATCH, nn.GroupNorm)
        or path(module) in {FROZEN, *WITH_ACTIVATION}
        or is_own(module)
        or origin_of(module) is not None
    )


def _is_suspect(module: nn.Module) -> bool:
    """A batch norm by its class or its buffers, but none that this module knows."""
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return False
    kinds = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, PopulationNorm)
    running = {"running_mean", "running_var"} & set(module._buffers)
    # One of the two is enough in a layer, as timm's EvoNorm has it; what holds layers may be more.
    return isinstance(module, kinds) or len(running) > bool(module._modules)


def _norms(
    model: nn.Module, only: Choice | None, unknown: Literal["refuse", "keep"]
) -> Iterator[tuple[str, nn.Module]]:
    if unknown not in ("refuse", "keep"):
        raise ValueError(f"unknown is 'refuse' or 'keep', not {unknown!r}")
    kept: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"{name or 'the model'} is TorchScript; convert before scripting")
        if type(module) is nn.parallel.DistributedDataParallel:
            raise ValueError("convert the model before DistributedDataParallel wraps it")
        if name.startswith(kept) or (only is not None and not only(name, module)):
            continue
        if _is_known(module):
            if "forward" in vars(module):
                raise ValueError(f"{name or 'the model'} has a forward of its own, put on it later")
            yield name, module
        elif _is_suspect(module):
            if unknown == "keep":
                kept += (f"{name}." if name else "",)
                continue
            raise ValueError(
                f"{name or 'the model'} is a {path(module)}, which may do more than normalize; "
                "unknown='keep' leaves such layers as they are"
            )


# -- one layer ------------------------------------------------------------------------------------


def _options(cls: type[nn.Module]) -> dict[str, inspect.Parameter]:
    """The options of `cls`, less what the old layer alone decides: whether there are weights."""
    parameters = list(inspect.signature(cls).parameters.values())[1:]
    return {p.name: p for p in parameters if p.name != "affine" or not isinstance(p.default, bool)}


def _successor(
    old: nn.Module,
    cls: type[nn.Module],
    options: dict[str, Any],
    accepted: dict[str, inspect.Parameter],
) -> tuple[nn.Module, tuple[str, ...]]:
    """A layer of `cls` with the tensors of `old`, and which of them are to learn no more.

    `old` is left as it is.
    """
    origin = origin_of(old) or (None if is_own(old) else Origin.of(old))
    values = tensors(old)
    given: dict[str, Any] = {}
    source = old if origin is None or hasattr(old, "eps") else origin.layer
    if "eps" in accepted and hasattr(source, "eps"):
        given["eps"] = source.eps
    if values.get("weight") is None and values.get("bias") is None and "weight" in values:
        given["affine"] = "none" if "affine" in accepted else False
    if "decay" in accepted and "decay" not in options:
        given |= _rule(old, origin, "cumulative" in accepted | options.keys())
    if "groups" in accepted and not {"groups", "channels_per_group"} & set(options):
        groups = getattr(old, "num_groups", None)
        given |= {} if groups is None else {"groups": groups}
    group = group_of(old) or (origin.group if origin else None)
    if "group" in accepted:
        given["group"] = group
    given |= options
    missing = [n for n, p in accepted.items() if p.default is p.empty and n not in given]
    if missing:
        raise ValueError(f"{cls.__name__} needs {', '.join(missing)}")
    new: nn.Module = cls(features(old), **_known_to(cls, given))
    if path(old) in WITH_ACTIVATION or (origin and origin.path in WITH_ACTIVATION):
        new.__class__ = with_activation(cls)
    untracked = "running_mean" in old._buffers and values["running_mean"] is None
    froze = hand_over(old, new, extras=origin.extras if origin else ())
    save_as(old, new)
    if isinstance(new, PopulationNorm):
        _choices(old, new, untracked)
    if origin is not None:
        given_anew = {"decay", "cumulative"} & set(options)
        rule = None if given_anew else _update_rule(new)
        now = given["group"] if "group" in accepted else group
        vars(new)[ORIGIN] = origin.now(rule, _chosen(new), froze, now)
    return new, froze


def _known_to(cls: type[nn.Module], given: dict[str, Any]) -> dict[str, Any]:
    """A norm that never has weights takes no `affine`."""
    takes = inspect.signature(cls).parameters
    return {name: value for name, value in given.items() if name != "affine" or name in takes}


def _update_rule(layer: nn.Module) -> tuple[float | None, bool]:
    return getattr(layer, "decay", None), getattr(layer, "cumulative", False)


def _momentum(layer: nn.Module) -> float | None:
    """In torch's words: None is a cumulative average."""
    momentum: Any = layer.momentum
    return None if getattr(layer, "cumulative", False) else momentum


def _rule(old: nn.Module, origin: Origin | None, cumulative: bool) -> dict[str, Any]:
    """The options that move the running statistics as `old` moves them."""
    if origin is None or (hasattr(old, "decay") and _update_rule(old) != origin.rule):
        if not hasattr(old, "decay"):
            return {}
        momentum = _momentum(old)
    elif hasattr(origin.layer, "momentum"):
        momentum = _momentum(origin.layer)
    else:
        return {}
    if momentum is None:
        if not cumulative:
            raise ValueError(
                "momentum=None averages cumulatively, which of normlab's norms bn does; give decay"
            )
        return {"cumulative": True}
    if momentum == 0:
        raise ValueError("momentum=0 never moves the statistics; give decay, or use norm='frozen'")
    return {"decay": complement(momentum)}


def _chosen(layer: nn.Module) -> tuple[Any, ...]:
    """Statistics, update and group_size as the layer's owner has them, in a context too."""
    return tuple(layer.own) if isinstance(layer, PopulationNorm) else (None, None, None)


def _choices(old: nn.Module, new: PopulationNorm, untracked: bool) -> None:
    """The choices of `old`, in normlab's words."""
    if isinstance(old, PopulationNorm):
        new.observers = old.observers
        if not isinstance(old, FrozenBatchNorm):
            new.statistics = new.statistics or old.own.statistics
            new.update = old.own.update if new.update is None else new.update
            check_update(new.update, new.statistics)
        new.group_size = old.own.group_size
    elif untracked:
        if new.statistics == "population":
            raise ValueError("it has no running statistics, and a frozen norm needs them")
        if new.update:
            raise ValueError("it has no running statistics, and update=True moves them")
        new.statistics, new.update = "batch", False
    elif not getattr(old, "track_running_stats", True):
        new.update = False


def _torch_layer(old: nn.Module, dims: int | None, lossy: bool) -> nn.Module:
    origin = origin_of(old)
    if origin is not None:
        if isinstance(old, PopulationNorm) and origin.choices != _chosen(old) and not lossy:
            raise ValueError(
                f"statistics, update, group_size are {_chosen(old)}, which torch's layer does not "
                "know; lossy=True drops them"
            )
        new = shell(origin.layer)
        if hasattr(old, "eps"):
            new.eps = old.eps
        if _update_rule(old) != origin.rule:
            vars(new)["momentum"] = _momentum(old)
        if hasattr(new, "process_group"):
            new.process_group = origin.group
        origin.make_room(new)
        hand_over(old, new, extras=origin.extras)
        return new
    affine = getattr(old, "weight", None) is not None
    if isinstance(old, NoNorm):
        new = nn.Identity()
    elif isinstance(old, SampleNorm):
        new = nn.GroupNorm(old.num_groups, old.num_features, eps=old.eps, affine=affine)
    else:
        assert isinstance(old, PopulationNorm)
        if old.batch != "sync" and dims is None:
            raise ValueError("which of nn.BatchNorm1d/2d/3d is not known; give dims")
        chosen = _chosen(old)[isinstance(old, FrozenBatchNorm) :]
        if not lossy and any(choice is not None for choice in chosen):
            raise ValueError(
                "torch's layer does not know statistics, update or group_size; lossy=True drops "
                "them"
            )
        momentum = _momentum(old)
        cls = nn.SyncBatchNorm if old.batch == "sync" else BATCH[(dims or 1) - 1]
        new = cls(old.num_features, eps=old.eps, momentum=momentum, affine=affine)
        if old.batch == "sync":
            new.process_group = old.group
    hand_over(old, new, extras=())
    save_as(old, new)
    return new


def _refuse_loss(old: nn.Module, new: nn.Module, lossy: bool) -> None:
    if lossy:
        return
    has, gets = ({n for n, v in tensors(m).items() if v is not None} for m in (old, new))
    untracked = "running_mean" in old._buffers and old._buffers["running_mean"] is None
    counted = {*STATISTICS, "weight", "bias"} - {"num_batches_tracked"}
    lost, fresh = counted & (has - gets), counted & (gets - has)
    kept = (
        hasattr(new, "group") or hasattr(new, "process_group") or origin_of(old) or origin_of(new)
    )
    if group_of(old) is not None and not kept:
        lost.add("group")
    if isinstance(old, PopulationNorm) and getattr(new, "running_mean", 0) is None:
        lost -= set(STATISTICS)  # never used, never saved: the layer keeps to its batches
    if untracked:
        fresh -= set(STATISTICS)
    for names, what in ((lost, "has no place for"), (fresh, "needs, and the layer lacks,")):
        if names:
            raise ValueError(
                f"{type(new).__name__} {what} {', '.join(sorted(names))}; lossy=True allows it"
            )


def _replace(
    model: nn.Module,
    new: dict[nn.Module, nn.Module],
    frozen: dict[nn.Module, tuple[str, ...]] | None = None,
) -> nn.Module:
    for old, layer in new.items():
        thaw(old)
        for name in frozen[old] if frozen else ():
            layer.get_parameter(name).requires_grad_(False)
        move_hooks(old, layer)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in new:
                parent._modules[name] = new[child]
    return new.get(model, model)
