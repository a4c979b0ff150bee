"""A norm folded into the layer before it, and split off again: `fuse` and `unfuse`."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from normlab.norms.base import PopulationNorm
from normlab.norms.l1 import L1BatchNorm
from normlab.surgery._kinds import BATCH, FROZEN, WITH_ACTIVATION, features, path
from normlab.surgery._tracing import trace
from normlab.surgery._transplant import WithActivation, tensors

__all__ = ["FoldedNorm", "Pair", "fold", "fuse", "fusible", "neighbours", "split", "unfuse"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LINEAR = (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear)
# Normalizing with the population is the affine map below for these, and only for these.
_OWN = ("BatchNorm", "BatchRenorm", "FrozenBatchNorm", "GhostBatchNorm", "L1BatchNorm",
        "SyncBatchNorm", "VirtualBatchNorm")  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """A layer and the norm that takes its output, by name; and what speaks against folding."""

    layer: str
    norm: str
    obstacle: str | None = None


class FoldedNorm(nn.Module):
    """Stands where a folded norm was: the identity, and the norm's activation if it has one.

    It holds the norm, outside the state_dict, for `unfuse`. Raises ValueError for an input of other
    dimensions than the folded layer's outputs have: its channels would not be the norm's.
    """

    def __init__(self, layer: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.pair = (layer, norm)  # in a tuple they are no submodules
        weight, bias = _parameters(layer)
        self.dims = weight.dim()
        self.bias = None if bias is None else bias.detach().clone()
        self.weight = weight.detach().clone() if (_affine(norm)[0] == 0).any() else None
        self.has_activation = isinstance(norm, WithActivation) or path(norm) in WITH_ACTIVATION
        if self.has_activation:
            self.drop, self.act = norm.drop, norm.act

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, ...) to the same shape."""
        if x.dim() != self.dims:
            raise ValueError(f"a folded norm here takes {self.dims} dimensions: {tuple(x.shape)}")
        if self.has_activation:
            x = self.get_submodule("act")(self.get_submodule("drop")(x))
        return x

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FoldedNorm":
        self.pair[1]._apply(fn, recurse=False)
        self.bias = None if self.bias is None else fn(self.bias)
        self.weight = None if self.weight is None else fn(self.weight)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        return type(self.pair[1]).__name__


def fuse(
    model: nn.Module, pairs: Iterable[tuple[str, str]] | None = None, *, partial: bool = False
) -> nn.Module:
    """Fold the batch norms of `model` into the convolutions or linear layers before them, in place.

    With scale = weight / sqrt(running_var + eps), the layer gets weight * scale and the bias
    (bias - running_mean) * scale + norm.bias, computed in float64, in its own Parameters (a new one
    where there was no bias), and a FoldedNorm stands in for the norm. The outputs stay, up to
    rounding; trained on, the two differ: f = w1 (w2 x + w3) and f = w2' x + w3' have different
    gradient steps.

    Folded is what torch.fx proves from the model's forward, called with its default arguments and
    in its present mode: see `fusible` for the uses of a layer's output that this shows, and those
    that it does not. A norm that does not directly follow such a layer stays.

    Args:
        model: changed in place. Build its optimizer afterwards: there may be new biases.
        pairs: names of a layer and of the norm that takes its output and is the only one to; for
            models that cannot be traced, where that is the caller's knowledge (see `neighbours`).
        partial: leave pairs with an obstacle as they are.

    Raises ValueError for pairs with an obstacle, naming it: a norm that would use batch statistics
    (call model.eval()) or has no population statistics, hooks, parametrizations, further users of
    the layer's output, layers or parameters in two places or two pairs, subclasses that may compute
    otherwise; and where the model cannot be traced.
    """
    found = fusible(model) if pairs is None else _given(model, list(pairs))
    stuck = [pair for pair in found if pair.obstacle]
    if stuck and not partial:
        more = f" (and {len(stuck) - 3} more)" if len(stuck) > 3 else ""
        lines = "; ".join(f"{p.layer} and {p.norm}: {p.obstacle}" for p in stuck[:3])
        raise ValueError(f"cannot fuse {lines}{more}; partial=True leaves them as they are")
    for pair in found:
        if not pair.obstacle:
            norm = model.get_submodule(pair.norm)
            _replace(model, norm, fold(model.get_submodule(pair.layer), norm))
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Put the folded norms of `model` back, in place, with the statistics and weights they had.

    The function stays what it is now, after training too: the layer before gets weight / scale and
    the bias that it had, and the norm's bias takes what is left (its running_mean, if it has none).
    A norm comes back in the mode that it was folded in, eval() as a rule. Without training in
    between, all is as it was before, up to rounding.

    Raises ValueError where a weight of the norm is 0 and the layer has learnt to be more than a
    constant there, and where the layer that was folded into is not in `model`.
    """
    modules = set(model.modules())
    folded = [module for module in modules if isinstance(module, FoldedNorm)]
    for stand_in in folded:
        layer, norm = stand_in.pair
        if layer not in modules:
            raise ValueError(f"the layer that {path(norm)} was folded into is not in the model")
        _check_constant(layer, norm)
    for stand_in in folded:
        layer, norm = stand_in.pair
        split(layer, norm, bias=stand_in.bias)
        if stand_in.weight is not None:
            weight, _ = _parameters(layer)
            dead = _per_output(layer, _affine(norm)[0].to(weight.device)) == 0
            with torch.no_grad():
                weight.copy_(torch.where(dead, stand_in.weight, weight))
        model = _replace(model, stand_in, norm)
    return model


def fold(layer: nn.Module, norm: nn.Module) -> FoldedNorm:
    """Fold `norm` into `layer`, a convolution or linear layer, in place; the stand-in for `norm`.

    The arithmetic of `fuse`, for one pair. Raises ValueError for the obstacles that show in the two
    layers themselves.
    """
    obstacle = _obstacle(layer, norm)
    if obstacle:
        raise ValueError(obstacle)
    stand_in = FoldedNorm(layer, norm)
    weight, bias = _parameters(layer)
    scale, shift = (value.to(weight.device) for value in _affine(norm))
    with torch.no_grad():
        weight.copy_(weight.double() * _per_output(layer, scale))
        if bias is None:
            new = shift.to(weight.dtype)
            layer.bias = nn.Parameter(new, requires_grad=weight.requires_grad)
        else:
            bias.copy_(bias.double() * scale + shift)
    return stand_in


def split(layer: nn.Module, norm: nn.Module, *, bias: Tensor | None = None) -> None:
    """Change `layer` and `norm` in place so that norm(layer(x)) is what layer(x) was.

    The norm keeps its statistics and weight: with its scale = weight / sqrt(running_var + eps), the
    layer gets weight / scale and `bias` (None: no bias), and the norm's bias the rest,
    layer.bias - (bias - running_mean) * scale. A norm without a bias has its running_mean take it.

    Raises ValueError for layers or norms that `fold` does not take, and where scale is 0 and the
    layer's weight is not.
    """
    obstacle = _obstacle(layer, norm)
    if obstacle:
        raise ValueError(obstacle)
    _check_constant(layer, norm)
    weight, own = _parameters(layer)
    scale = _affine(norm)[0].to(weight.device)
    rows = _per_output(layer, scale)
    with torch.no_grad():
        old = torch.zeros_like(scale) if own is None else own.double().clone()
        new = torch.zeros_like(scale) if bias is None else bias.double()
        weight.copy_(torch.where(rows == 0, 0, weight.double() / rows))
        if bias is None:
            vars(layer)["_parameters"]["bias"] = None
        elif own is None:
            layer.bias = nn.Parameter(bias.clone(), requires_grad=weight.requires_grad)
        else:
            own.copy_(bias)
        left, mean = tensors(norm)["bias"], tensors(norm)["running_mean"]
        assert mean is not None
        if left is None:
            mean.copy_(new - old / scale)
        else:
            left.copy_(old - (new - mean.double()) * scale)


def fusible(model: nn.Module) -> list[Pair]:
    """The norms of `model` that take the output of a convolution or linear layer, in order of use.

    Each comes with what speaks against folding, if anything does. Found by tracing the forward with
    torch.fx, which calls no layer and leaves the model, its attributes too, as it was.

    Seen is every use of a layer's output in `model(x)`, in the present mode and with the default
    values of forward's other arguments: by other layers and operations, in what it returns, in
    hooks (of the two, or of a module around one of them), and what forward leaves in the model's
    attributes and in dictionaries, lists, tuples and sets there. Not seen are uses that only other
    arguments, the other mode or other methods bring about, what forward leaves elsewhere (global
    variables, objects of other kinds), and hooks that are put on later.

    Raises ValueError if the model cannot be traced.
    """
    opened = {
        module
        for module in model.modules()
        if any(_is_norm(inner) for inner in module.modules() if inner is not module)
    }
    try:
        traced = trace(model, opened)
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"torch.fx cannot trace {type(model).__name__} ({type(error).__name__}: {reason}); "
            "give pairs"
        ) from error
    modules = dict(model.named_modules(remove_duplicate=False))
    calls = [node for node in traced.graph.nodes if node.op == "call_module"]
    times = Counter(modules[str(node.target)] for node in calls)
    read = {str(node.target) for node in traced.graph.nodes if node.op == "get_attr"}
    uses = _uses(model)
    found = []
    for node in calls:
        before = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        if not isinstance(before, fx.Node) or before.op != "call_module":
            continue
        if not _is_norm(modules[str(node.target)]):
            continue
        pair = str(before.target), str(node.target)
        layer, norm = (modules[name] for name in pair)
        if not isinstance(layer, _LINEAR):
            continue
        obstacle = _obstacle(layer, norm) or _shared(model, pair, uses)
        if len(before.users) > 1:
            obstacle = f"the output of {pair[0]} has {len(before.users)} users"
        elif before in traced.kept:
            obstacle = f"the model keeps the output of {pair[0]}"
        elif hooked := [n for n in traced.hooked if any(p.startswith(f"{n}.") for p in pair)]:
            obstacle = f"{hooked[0]} has hooks"
        elif max(times[layer], times[norm]) > 1:
            obstacle = "one of the two is called more than once"
        elif any(name.rpartition(".")[0] in pair for name in read):
            obstacle = "the model reads their parameters"
        found.append(Pair(*pair, obstacle))
    return found


def neighbours(model: nn.Module) -> list[tuple[str, str]]:
    """Each layer directly followed by a norm in an nn.Sequential of `model`: `pairs` for `fuse`.

    Whether nothing else uses the layer's output, the caller must know.
    """
    found = []
    for name, module in model.named_modules():
        if type(module) is nn.Sequential:
            children = list(module.named_children())
            for (first, layer), (second, norm) in pairwise(children):
                if isinstance(layer, _LINEAR) and _is_norm(norm):
                    prefix = f"{name}." if name else ""
                    found.append((prefix + first, prefix + second))
    return found


# -- one pair -------------------------------------------------------------------------------------


def _is_norm(module: nn.Module) -> bool:
    kinds = (nn.modules.batchnorm._BatchNorm, PopulationNorm)
    return isinstance(module, kinds) or path(module) in {FROZEN, *WITH_ACTIVATION}


def _is_known(norm: nn.Module) -> bool:
    if isinstance(norm, PopulationNorm):
        cls = type(norm).__bases__[-1] if isinstance(norm, WithActivation) else type(norm)
        return cls.__module__.startswith("normlab.norms.") and cls.__name__ in _OWN
    return type(norm) in BATCH or path(norm) in {FROZEN, *WITH_ACTIVATION}


def _parameters(layer: nn.Module) -> tuple[nn.Parameter, nn.Parameter | None]:
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    assert weight is not None
    return weight, bias


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """scale and shift (C,) in float64 such that the norm is x * scale + shift."""
    values: Any = norm
    mean, var = values.running_mean.detach().double(), values.running_var.detach().double()
    if isinstance(norm, L1BatchNorm):
        scale = 1 / (var.sqrt() + values.eps)
    else:
        scale = (var + values.eps).rsqrt()
    if values.weight is not None:
        scale = scale * values.weight.detach().double()
    shift = -mean * scale
    return scale, shift if values.bias is None else shift + values.bias.detach().double()


def _per_output(layer: nn.Module, values: Tensor) -> Tensor:
    """values (C,) in the shape of the layer's weight, each with the weights of its output."""
    weight, _ = _parameters(layer)
    if isinstance(layer, _TRANSPOSED):  # (inputs, outputs / groups, ...), inputs in group order
        groups = layer.groups
        rows = values.view(groups, 1, -1).expand(groups, weight.size(0) // groups, -1)
        values = rows.reshape(weight.shape[:2])
        return values.view(*values.shape, *[1] * (weight.dim() - 2))
    return values.view(-1, *[1] * (weight.dim() - 1))


def _obstacle(layer: nn.Module, norm: nn.Module) -> str | None:
    """What in the two layers themselves makes folding inexact, or unprovable."""
    if type(layer) not in _LINEAR:
        return f"{path(layer)} may compute otherwise than torch's own layers"
    if not _is_known(norm):
        return f"{path(norm)} may do more than normalize with its running statistics"
    if "forward" in vars(layer) or "forward" in vars(norm):
        return "a forward was put on one of the two"
    for module in (layer, norm):
        if parametrize.is_parametrized(module) or "weight" not in {
            **module._parameters,
            **module._buffers,
        }:
            return f"{path(module)} has a parametrized weight"
        hooks = [n for n, v in vars(module).items() if n.endswith("_hooks") and "state" not in n]
        if any(vars(module)[name] for name in hooks):
            return f"{path(module)} has hooks"
    if getattr(norm, "running_mean", None) is None:
        return "the norm has no running statistics (track_running_stats=False)"
    population = norm.source == "population" if isinstance(norm, PopulationNorm) else (
        isinstance(norm, nn.modules.batchnorm._BatchNorm) <= (not norm.training)
    )  # fmt: skip
    if not population:
        return "the norm would use batch statistics; call eval()"
    outputs = getattr(layer, "out_channels", getattr(layer, "out_features", None))
    if outputs != features(norm):
        return f"the layer has {outputs} outputs, the norm {features(norm)} channels"
    return None


def _given(model: nn.Module, pairs: list[tuple[str, str]]) -> list[Pair]:
    uses = _uses(model)
    times = Counter(model.get_submodule(name) for pair in pairs for name in pair)
    found = []
    for pair in pairs:
        layer, norm = map(model.get_submodule, pair)
        obstacle = _obstacle(layer, norm) or _shared(model, pair, uses)
        twice = [name for name, m in zip(pair, (layer, norm), strict=True) if times[m] > 1]
        found.append(Pair(*pair, f"{twice[0]} is in two pairs" if twice else obstacle))
    return found


def _uses(model: nn.Module) -> Counter[int]:
    """How often each module, and each parameter, has a place in `model`, by id."""
    places = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    for module in model.modules():
        places.update(id(p) for p in module._parameters.values() if p is not None)
    return places


def _shared(model: nn.Module, pair: tuple[str, str], uses: Counter[int]) -> str | None:
    for name in pair:
        module = model.get_submodule(name)
        if uses[id(module)] > 1:
            return f"{name} is at two places of the model"
        if any(uses[id(p)] > 1 for p in module._parameters.values() if p is not None):
            return f"{name} shares a parameter with another layer"
    return None


def _check_constant(layer: nn.Module, norm: nn.Module) -> None:
    weight, _ = _parameters(layer)
    rows = _per_output(layer, _affine(norm)[0].to(weight.device))
    if ((rows == 0) & (weight != 0)).any():
        raise ValueError(
            f"{path(norm)} has a weight of 0 in a channel where the layer before it is not constant"
        )


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
    return new if model is old else model
