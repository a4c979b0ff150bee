"""The model that a command is about, from its name."""

from ast import literal_eval
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from inspect import signature
from typing import Any

from torch import nn

from normlab.subject import code

__all__ = ["load_model"]

FORMS = "torchvision:NAME, timm:NAME or path/to/file.py:FUNCTION"


def load_model(spec: str, options: Mapping[str, str] = {}) -> nn.Module:
    """The model that `spec` names, on the CPU, as its maker makes it.

        load_model("torchvision:resnet50", {"num_classes": "10"})

    Args:
        spec: `torchvision:resnet50` (any of torchvision's builders, for detection and segmentation
            too), `timm:resnet50`, or `path/to/file.py:make_model`, a function of the user's.
        options: keyword arguments of the maker. Values are Python literals ('10', 'None',
            '(3, 4)'); what is none is a string.

    Nothing is downloaded unless an option asks for it: torchvision's `weights` and
    `weights_backbone` are None, and timm's `pretrained` False.

    Raises ValueError in one line for a name that there is not, for options that do not fit, for
    what the maker raises and for a result that is no module.
    """
    given = {name: _literal(value) for name, value in options.items()}
    source, _, name = spec.partition(":")
    if code.is_code(spec):
        model = code.call(code.named(spec), spec, **given)
    elif source == "torchvision" and name:
        builder = _torchvision(name)
        offline = {key: None for key in ("weights", "weights_backbone") if _takes(builder, key)}
        model = code.call(builder, spec, **offline | given)
    elif source == "timm" and name:
        model = code.call(_timm(name), spec, name, **{"pretrained": False} | given)
    else:
        raise ValueError(f"a model is {FORMS}, not '{spec}'")
    if not isinstance(model, nn.Module):
        raise ValueError(f"{spec} returned a {type(model).__name__}, not a torch.nn.Module")
    return model


def _literal(value: str) -> Any:
    try:
        return literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def _takes(function: Callable[..., Any], name: str) -> bool:
    return name in signature(function).parameters


def _torchvision(name: str) -> Callable[..., nn.Module]:
    from torchvision import models

    known = models.list_models()
    if name not in known:
        raise ValueError(f"torchvision has no model '{name}'{_near(name, known)}")
    builder: Callable[..., nn.Module] = models.get_model_builder(name)
    return builder


def _timm(name: str) -> Callable[..., nn.Module]:
    try:
        import timm
    except ImportError:
        raise ValueError("timm is not installed: pip install 'normlab[models]'") from None
    if not timm.is_model(name):
        raise ValueError(f"timm has no model '{name}'{_near(name, timm.list_models())}")
    maker: Callable[..., nn.Module] = timm.create_model
    return maker


def _near(name: str, known: list[str]) -> str:
    close = get_close_matches(name, known, 1)
    return f"; did you mean '{close[0]}'?" if close else ""
