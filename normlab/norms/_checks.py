"""What every layer refuses: arguments and inputs that no norm is defined for."""

import math
from numbers import Integral, Real

import torch
from torch import Tensor

__all__ = ["check_common", "check_decay", "check_input", "check_nbs", "check_real", "check_whole"]

_HALF = (torch.bfloat16, torch.float16)


def check_whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")


def check_real(name: str, value: object, allowed: str, low: float, *, open: bool = False) -> None:
    """Refuse what is no finite number from `low` on, or above it where `open`."""
    number = float(value) if isinstance(value, Real) else math.nan
    if not math.isfinite(number) or number < low or (open and number == low):
        raise ValueError(f"{name} must be {allowed}, not {value!r}")


def check_common(num_features: int, eps: float) -> None:
    check_whole("num_features", num_features, 1)
    check_real("eps", eps, "above 0 and finite", 0.0, open=True)


def check_decay(decay: object) -> None:
    if not isinstance(decay, Real) or not 0 <= float(decay) < 1:
        raise ValueError(
            f"decay must be in [0, 1), not {decay!r}"
            + (": statistics that never move are statistics='population'" * (decay == 1))
        )


def check_nbs(nbs: object, layer: str) -> None:
    """Refuse chunks of other than a whole number of samples from 2 on."""
    if nbs == 1 and not isinstance(nbs, bool):
        raise ValueError(f"nbs=1 is instance norm (norm=in); {layer} needs nbs >= 2")
    check_whole("nbs", nbs, 2)


def check_input(x: Tensor, num_features: int, layer: str, own: Tensor | None = None) -> None:
    """Refuse a shape or a dtype that a layer does not take; own: a tensor of the layer's, if any.

    Half inputs go with float32 layers, as autocast has them; else the dtypes are the same.
    """
    if not 2 <= x.dim() <= 5:
        raise ValueError(f"{layer} takes 2 to 5 dimensions (N, C, ...), not {tuple(x.shape)}")
    if x.size(1) != num_features:
        raise ValueError(f"{layer}({num_features}) got {x.size(1)} channels: {tuple(x.shape)}")
    if own is not None and x.dtype == own.dtype:
        return
    if not x.is_floating_point():
        raise ValueError(f"{layer} takes floating-point inputs, not {x.dtype}")
    if own is not None and not (own.dtype == torch.float32 and x.dtype in _HALF):
        raise ValueError(f"{layer} in {own.dtype} got an input in {x.dtype}: cast one of them")
