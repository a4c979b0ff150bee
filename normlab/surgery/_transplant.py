"""Moving everything that makes up a layer into another of a different class."""

import copy
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normlab.surgery._kinds import base_type, is_own

__all__ = [
    "ORIGIN",
    "STATISTICS",
    "Origin",
    "WithActivation",
    "group_of",
    "hand_over",
    "origin_of",
    "save_as",
    "shell",
    "tensors",
    "thaw",
    "with_activation",
]

ORIGIN = "converted_from"
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_NAMES = ("weight", "bias", *STATISTICS)
_ONES = {"weight", "running_var"}
_BARE = frozenset(vars(nn.Module()))


def tensors(module: nn.Module) -> dict[str, Tensor | None]:
    """Parameters, buffers and parametrized tensors of the layer itself, absent ones as None."""
    found: dict[str, Tensor | None] = {**module._parameters, **module._buffers}
    if parametrize.is_parametrized(module):
        found |= {name: getattr(module, name) for name in _parametrizations(module)}
    return found


def _parametrizations(module: nn.Module) -> nn.ModuleDict:
    lists = module._modules.get("parametrizations")
    return lists if isinstance(lists, nn.ModuleDict) else nn.ModuleDict()


def shell(module: nn.Module) -> nn.Module:
    """A layer of the same class and attributes, without tensors, submodules and hooks."""
    cls = base_type(module)
    empty = cls.__new__(cls)
    nn.Module.__init__(empty)
    vars(empty).update({k: v for k, v in vars(module).items() if k not in _BARE})
    return empty


@dataclass(frozen=True)
class Origin:
    """What a converted layer was: enough to make that layer again.

    layer: its shell. parameters, buffers: its tensors' names, with a meta tensor for each that was
    there, and the device. saved: the buffers in its state_dict. extras: what others had put on it,
    tensors and submodules, by name. rule, choices: the decay and whether cumulative, and the
    choices, that the converted layer was made with; rule is None where it was not the origin's.
    froze: the parameters whose gradient the conversion took away. group: the ranks that share
    statistics, through layers that have no place for it; copies have them in common.
    """

    layer: nn.Module
    parameters: dict[str, Tensor | None]
    buffers: dict[str, Tensor | None]
    saved: frozenset[str]
    device: torch.device
    extras: tuple[str, ...]
    rule: tuple[float | None, bool] | None = None
    choices: tuple[Any, ...] = ()
    froze: tuple[str, ...] = ()
    group: Any = None

    @classmethod
    def of(cls, module: nn.Module) -> "Origin":
        def outline(values: dict[str, Any]) -> dict[str, Tensor | None]:
            return {
                name: None if v is None else torch.empty_like(v, device="meta")
                for name, v in values.items()
                if name in _NAMES
            }

        values = tensors(module)
        parametrized = {name: values[name] for name in _parametrizations(module)}
        places = [v.device for v in values.values() if v is not None]
        extras = [n for n in (*values, *module._modules) if n not in (*_NAMES, "parametrizations")]
        return cls(
            shell(module),
            outline({**module._parameters, **parametrized}),
            outline(module._buffers),
            frozenset(module._buffers) - module._non_persistent_buffers_set,
            places[0] if places else torch.device("cpu"),
            tuple(extras),
            group=group_of(module),
        )

    @property
    def path(self) -> str:
        return f"{type(self.layer).__module__}.{type(self.layer).__qualname__}"

    def now(
        self,
        rule: tuple[float | None, bool] | None,
        choices: tuple[Any, ...],
        froze: tuple[str, ...],
        group: Any,
    ) -> "Origin":
        return replace(self, rule=rule, choices=choices, froze=froze, group=group)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Origin":
        for group in (self.group, group_of(self.layer)):  # processes have no copies
            memo[id(group)] = group
        return Origin(*(copy.deepcopy(getattr(self, field.name), memo) for field in fields(self)))

    def make_room(self, module: nn.Module) -> None:
        """The tensors of the origin, at their initial values, on its shell `module`."""

        def initial(name: str, like: Tensor | None) -> Tensor | None:
            if like is None:
                return None
            make = torch.ones_like if name in _ONES else torch.zeros_like
            return make(like, device=self.device)

        for name, like in self.parameters.items():
            value = initial(name, like)
            module.register_parameter(name, None if value is None else nn.Parameter(value))
        for name, like in self.buffers.items():
            module.register_buffer(name, initial(name, like), persistent=name in self.saved)


def group_of(module: nn.Module) -> Any:
    """The process group of a synchronized layer, torch's or normlab's; None: all ranks, or none."""
    return getattr(module, "group" if is_own(module) else "process_group", None)


def origin_of(module: nn.Module) -> Origin | None:
    found = vars(module).get(ORIGIN)
    return found if isinstance(found, Origin) else None


def thaw(old: nn.Module) -> None:
    """Let learn again what the conversion into `old` froze."""
    origin = origin_of(old)
    for name in origin.froze if origin else ():
        old._parameters[name].requires_grad_()  # type: ignore[union-attr]


def hand_over(old: nn.Module, new: nn.Module, *, extras: tuple[str, ...]) -> tuple[str, ...]:
    """Give `new` the tensors, parametrizations, mode and `extras` of `old`, which stays as it is.

    Parameters go over as the objects that they are, buffers as copies. What `old` has as None
    becomes None where it is a weight or bias; what `new` has as None stays so. Where the parameters
    of `new` do not learn, those that it gets must not either: returns the names of these.
    """
    origin, froze = origin_of(old), []
    thawing = origin.froze if origin else ()
    values = tensors(old)
    present = [v for v in values.values() if v is not None and v.is_floating_point()]
    if present:
        new.to(device=present[0].device, dtype=present[0].dtype)
    for name, value in values.items():
        place: dict[str, Any] = new._parameters if name in new._parameters else new._buffers
        room = place.get(name) if name in _NAMES else None
        if room is None:
            continue
        if value is None:
            if name in ("weight", "bias"):
                place[name] = None
            continue
        if place is new._buffers and room.shape[room.dim() - value.dim() :] == value.shape:
            place[name] = value.detach().expand(room.shape).clone()  # the same for every domain
        elif room.shape != value.shape:
            raise ValueError(
                f"{name} has the shape {tuple(value.shape)}, and {type(new).__name__}'s is "
                f"{tuple(room.shape)}"
            )
        elif name in _parametrizations(old):
            _move_parametrization(old, new, name)
        else:
            kept = isinstance(value, nn.Parameter)
            if kept and not room.requires_grad and (value.requires_grad or name in thawing):
                froze.append(name)
            place[name] = value if kept else nn.Parameter(value.detach().clone(), False)
    for name in extras:
        for group in ("_parameters", "_buffers", "_modules"):
            if name in getattr(old, group):
                getattr(new, group)[name] = getattr(old, group)[name]
        if name in old._non_persistent_buffers_set:
            new._non_persistent_buffers_set.add(name)
    new.training = old.training
    return tuple(froze)


def save_as(old: nn.Module, new: nn.Module) -> None:
    """Leave out of the state_dict of the batch norm `new` what is not in that of `old`."""
    if "running_mean" in old._buffers:
        unsaved = {
            name
            for name in STATISTICS
            if old._buffers.get(name) is None or name in old._non_persistent_buffers_set
        }
        new._non_persistent_buffers_set |= unsaved & set(new._buffers)


def _move_parametrization(old: nn.Module, new: nn.Module, name: str) -> None:
    if name not in new._parameters:
        raise ValueError(f"{name} is parametrized, and {type(new).__name__} has it as a buffer")
    parametrize.register_parametrization(new, name, nn.Identity())
    _parametrizations(new)[name] = _parametrizations(old)[name]


class WithActivation(nn.Module):
    """A norm followed by dropout and an activation, timm's `drop` and `act`."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.drop(super().forward(x)))
        return y

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        (norm,) = type(self).__bases__[1:]
        state = self.__getstate__()  # type: ignore[no-untyped-call]
        return _empty_with_activation, (norm,), state


def _empty_with_activation(norm: type[nn.Module]) -> nn.Module:
    cls = with_activation(norm)
    return cls.__new__(cls)


_fused: dict[type[nn.Module], type[nn.Module]] = {}


def with_activation(norm: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `norm` whose forward ends with its submodules `drop` and `act`."""
    if norm not in _fused:
        name = f"{norm.__name__}Act"
        _fused[norm] = type(name, (WithActivation, norm), {"__module__": norm.__module__})
    return _fused[norm]
