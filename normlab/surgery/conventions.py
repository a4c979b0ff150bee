"""One batch norm in the words of torch, Keras (TensorFlow) and Caffe: `read`, `write`, `translate`.

============  ======================  =====================  =====================================
              torch                   keras                  caffe
============  ======================  =====================  =====================================
weight, bias  weight, bias            gamma, beta            gamma, beta (of a Scale layer)
mean          running_mean            moving_mean            mean / scale_factor
variance      running_var             moving_variance        variance / scale_factor
it is         unbiased                biased                 unbiased
further       num_batches_tracked                            scale_factor, the sum of the weights
update        (1 - m) old + m batch   m old + (1 - m) batch  m old + batch, scale_factor too
m by default  momentum = 0.1          momentum = 0.99        moving_average_fraction = 0.999
epsilon       eps = 1e-5              epsilon = 1e-3         eps = 1e-5
============  ======================  =====================  =====================================

Unbiased is the variance with n/(n-1), of the n elements per channel that a training batch had.
Where TensorFlow's fused kernel trained a Keras layer, its variance is unbiased too:
`variance="unbiased"`. Caffe's blobs are, in their order, mean, variance and scale_factor of the
BatchNorm layer, gamma and beta of the Scale layer; its EMA divides by the weights so far, and has
no initial value to forget: m is its decay once that sum has reached 1 / (1 - m).
A Keras layer may have gamma or beta alone (center=False, scale=False). torch's layers and Caffe's
Scale have both or neither, so that for these `write` adds the missing one: ones, or zeros.
Sources: the documentation of torch.nn.BatchNorm2d and keras.layers.BatchNormalization; Caffe's
src/caffe/layers/batch_norm_layer.cpp.

Only norms are translated: kernels of convolutions are laid out differently too (HWIO in Keras).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from normlab.norms.base import complement

__all__ = ["CONVENTIONS", "Convention", "NormState", "read", "translate", "with_eps", "write"]

Framework = Literal["torch", "keras", "caffe"]
Variance = Literal["biased", "unbiased"]


@dataclass(frozen=True)
class Convention:
    """How one framework spells a batch norm.

    names: of weight, bias, mean and var. constant: what its EMA constant is called; share: whether
    that is the old value's share ("old") or the newest batch's ("new"). eps, momentum: defaults.
    epsilon: what eps is called.
    """

    names: tuple[str, str, str, str]
    further: str | None
    separator: str
    constant: str
    share: Literal["old", "new"]
    variance: Variance
    eps: float
    momentum: float
    epsilon: str = "eps"


CONVENTIONS: dict[str, Convention] = {
    "torch": Convention(
        ("weight", "bias", "running_mean", "running_var"), "num_batches_tracked", ".",
        "momentum", "new", "unbiased", 1e-5, 0.1,
    ),
    "keras": Convention(
        ("gamma", "beta", "moving_mean", "moving_variance"), None, "/",
        "momentum", "old", "biased", 1e-3, 0.99, "epsilon",
    ),
    "caffe": Convention(
        ("gamma", "beta", "mean", "variance"), "scale_factor", "/",
        "moving_average_fraction", "old", "unbiased", 1e-5, 0.999,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class NormState:
    """One batch norm, in normlab's words: y = weight (x - mean) / sqrt(var + eps) + bias.

    weight, bias, mean, var: (C,), weight and bias None where there are none. variance: whether var
    is the biased or the unbiased variance of training batches. decay: the share of the statistics
    that stays at an update; None: a cumulative average. batches: updates so far, 0 if not known.
    """

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    var: Tensor
    variance: Variance
    eps: float
    decay: float | None
    batches: int = 0

    def as_variance(self, variance: Variance, count: int | None) -> "NormState":
        """With var biased or unbiased, for training batches of `count` elements per channel."""
        if variance == self.variance:
            return self
        if count is None or count < 2:
            raise ValueError(
                f"the variance is {self.variance} and to be {variance}: that needs count, the "
                f"elements per channel of a training batch (N * H * W), at least 2, not {count}"
            )
        factor = count / (count - 1) if variance == "unbiased" else (count - 1) / count
        return replace(self, var=self.var * factor, variance=variance)


def read(
    framework: Framework,
    tensors: Mapping[str, Tensor],
    *,
    eps: float | None = None,
    momentum: float | Literal["default", "cumulative"] = "default",
    variance: Variance | None = None,
) -> NormState:
    """The batch norm that `framework` keeps as `tensors`.

    Args:
        framework: "torch", "keras" or "caffe".
        tensors: by the framework's names, as in the table above. Weight and bias may be absent.
        eps: the layer's, which no checkpoint holds; None: the framework's default.
        momentum: the layer's EMA constant in the framework's own words, or "cumulative" (torch's
            None).
        variance: whether the checkpoint's is "biased" or "unbiased"; None: the framework's habit.

    A Caffe scale_factor of 0, a layer that was never trained, means mean 0 and variance 0, as Caffe
    itself reads it. Raises ValueError for missing or unknown names and for values out of range.
    """
    convention = _convention(framework)
    weight, bias, mean, var = convention.names
    known = {*convention.names, *([convention.further] if convention.further else [])}
    unknown, missing = sorted(set(tensors) - known), sorted({mean, var} - set(tensors))
    if framework == "caffe" and "scale_factor" not in tensors:
        missing.append("scale_factor")
    if unknown or missing:
        raise ValueError(
            f"{framework} keeps a batch norm as {', '.join(sorted(known))}; "
            + (f"missing: {', '.join(missing)}" if missing else f"unknown: {', '.join(unknown)}")
        )
    values = {name: tensors[name].detach().clone() for name in tensors}
    if framework == "caffe":
        total = values["scale_factor"].double().sum().item()
        factor = 0.0 if total == 0 else 1 / total
        values |= {name: values[name] * factor for name in (mean, var)}
    if (values[var] < 0).any():
        raise ValueError(f"{var} has negative values: is it of another convention?")
    batches = values.get("num_batches_tracked")
    return NormState(
        values.get(weight),
        values.get(bias),
        values[mean],
        values[var],
        _one_of(variance, Variance, convention.variance),
        convention.eps if eps is None else _positive(eps),
        _decay(convention, momentum),
        0 if batches is None else int(batches),
    )


def write(
    framework: Framework,
    state: NormState,
    *,
    count: int | None = None,
    variance: Variance | None = None,
    scale_factor: float | None = None,
) -> tuple[dict[str, Tensor], dict[str, float | None]]:
    """`state` in the words of `framework`: its tensors, and the options its layer needs.

    Args:
        framework: "torch", "keras" or "caffe".
        count: elements per channel of a training batch, where the variance changes its kind.
        variance: what the checkpoint is to hold; None: the framework's habit.
        scale_factor: of Caffe's sums. None: 1 / (1 - decay), with which training goes on as an EMA
            with this decay does; with 1 the next batch would count as much as all before.

    Of weight and bias, torch and Caffe get both or neither: an absent weight is written as ones, an
    absent bias as zeros (torch.nn.BatchNorm2d(C, bias=False), of late, wants that left out again).
    The options are eps and the EMA constant under the framework's names: nothing is adapted to a
    default. For a layer with another eps see `with_eps`. Raises ValueError for a missing count and
    for a cumulative average, which torch alone has.
    """
    convention = _convention(framework)
    state = state.as_variance(_one_of(variance, Variance, convention.variance), count)
    if state.decay is None and framework != "torch":
        raise ValueError(f"{framework} has no cumulative average; replace decay in the state")
    weight, bias, mean, var = convention.names
    found = {weight: state.weight, bias: state.bias, mean: state.mean, var: state.var}
    if framework != "keras" and (state.weight is None) != (state.bias is None):
        given = state.bias if state.weight is None else state.weight
        assert given is not None
        found[weight] = torch.ones_like(given) if state.weight is None else given
        found[bias] = torch.zeros_like(given) if state.bias is None else given
    tensors = {name: v.detach().clone() for name, v in found.items() if v is not None}
    if framework == "torch":
        tensors["num_batches_tracked"] = torch.tensor(state.batches)
    if framework == "caffe":
        assert state.decay is not None
        total = 1 / (1 - state.decay) if scale_factor is None else _positive(scale_factor)
        tensors |= {name: tensors[name] * total for name in (mean, var)}
        tensors["scale_factor"] = state.mean.new_tensor([total])
    elif scale_factor is not None:
        raise ValueError(f"{framework} has no scale_factor; Caffe has")
    return tensors, {
        convention.epsilon: state.eps,
        convention.constant: _momentum(convention, state.decay),
    }


def with_eps(state: NormState, eps: float) -> NormState:
    """The same function with another eps: var + eps stays.

    For a layer whose eps is given, as cuDNN's at least 1e-5. The variance is then no longer that of
    the data, which matters where training goes on. Raises ValueError if it would become negative.
    """
    var = state.var + (state.eps - _positive(eps))
    if (var < 0).any():
        raise ValueError(
            f"eps={eps} is {eps - state.eps:g} more than {state.eps}, and the smallest variance is "
            f"{state.var.min().item():g}"
        )
    return replace(state, var=var, eps=eps)


def translate(
    tensors: Mapping[str, Tensor],
    source: Framework,
    target: Framework,
    *,
    eps: float | None = None,
    momentum: float | Literal["default", "cumulative"] = "default",
    variance: Variance | None = None,
    count: int | Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """A checkpoint with every batch norm in the words of `target`, and all else as it is.

    A batch norm is a layer, by the part of the name before the last "." or "/", with both the mean
    and the variance of `source`; a ":0" at the end of a name is dropped there. Its name stays, its
    entries get the names and the separator of `target`, in the place of the first of them.

    Args:
        tensors: the checkpoint, by name.
        source, target: "torch", "keras" or "caffe".
        eps, momentum, variance: of the checkpoint's layers, see `read`. The new layers need the
            options that `write` returns for these.
        count: elements per channel of a training batch, for all layers or by layer's name.

    Raises ValueError, naming the layer, where `read` and `write` do; nothing is guessed.
    """
    convention = _convention(source)
    layers: dict[str, dict[str, str]] = {}
    for name in tensors:
        layer, entry = _split(name)
        layers.setdefault(layer, {})[entry] = name
    _, _, mean, var = convention.names
    norms = {layer: entries for layer, entries in layers.items() if {mean, var} <= set(entries)}
    separator = _convention(target).separator
    translated: dict[str, Tensor] = {}
    for name, value in tensors.items():
        layer, _ = _split(name)
        entries = norms.pop(layer, None)
        if entries is None:
            if not ({mean, var} <= set(layers[layer])):
                translated[name] = value
            continue
        elements = count.get(layer) if isinstance(count, Mapping) else count
        try:
            state = read(
                source,
                {entry: tensors[full] for entry, full in entries.items()},
                eps=eps,
                momentum=momentum,
                variance=variance,
            )
            written, _ = write(target, state, count=elements)
        except ValueError as error:
            raise ValueError(f"{layer}: {error}") from error
        translated |= {f"{layer}{separator}{e}" if layer else e: v for e, v in written.items()}
    return translated


def _split(name: str) -> tuple[str, str]:
    """'block/bn:0' style names into the layer and its entry."""
    cut = max(name.rfind("."), name.rfind("/"))
    return name[: max(cut, 0)], name[cut + 1 :].removesuffix(":0")


def _convention(framework: str) -> Convention:
    if framework not in CONVENTIONS:
        raise ValueError(f"framework is one of {', '.join(CONVENTIONS)}, not {framework!r}")
    return CONVENTIONS[framework]


def _one_of(value: Variance | None, allowed: object, default: Variance) -> Variance:
    if value is None:
        return default
    if value not in get_args(allowed):
        raise ValueError(f"variance is one of {', '.join(get_args(allowed))}, not {value!r}")
    return value


def _positive(value: float) -> float:
    if not value > 0:
        raise ValueError(f"eps and scale_factor must be above 0, not {value}")
    return value


def _decay(
    convention: Convention, momentum: float | Literal["default", "cumulative"]
) -> float | None:
    if momentum == "cumulative":
        if convention.share == "old":
            raise ValueError("only torch has a cumulative average")
        return None
    constant = convention.momentum if momentum == "default" else momentum
    assert not isinstance(constant, str)
    decay = constant if convention.share == "old" else complement(constant)
    if not 0 <= decay < 1:
        raise ValueError(
            f"{convention.constant}={constant} leaves {decay:g} of the old statistics at an "
            "update; that must be in [0, 1)"
        )
    return decay


def _momentum(convention: Convention, decay: float | None) -> float | None:
    if decay is None or convention.share == "old":
        return decay
    return complement(decay)
