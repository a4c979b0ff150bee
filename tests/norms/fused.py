"""Tests of other files once more, for test_fused.py and test_fused_long.py."""

import functools
import inspect
from collections.abc import Callable, Iterator
from importlib import import_module
from types import FunctionType

import torch


def again(
    path: str, wanted: Callable[[str], bool] = lambda _: True
) -> Iterator[tuple[str, object]]:
    """The tests of a file that are wanted by name, and its fixtures: under names of their own.

    Files use the same names, and a copy can be marked where the original is not.
    """
    file = path.rpartition(".test_")[2]
    for name, value in vars(import_module(path)).items():
        if inspect.isfunction(value) and name.startswith("test_") and wanted(name):
            made = FunctionType(
                value.__code__, value.__globals__, value.__name__, value.__defaults__,
                value.__closure__,
            )  # fmt: skip
            functools.update_wrapper(made, value)
            del made.__wrapped__  # pytest would take the marks of what it finds there
            made.pytestmark = [*getattr(value, "pytestmark", [])]
            yield f"{file}_{name.removeprefix('test_')}", made
        elif inspect.isclass(value) and name.startswith("Test"):
            yield f"Test{file}{name}", type(name, (value,), {})


def near(a: torch.Tensor, b: torch.Tensor, *, rounding: float) -> bool:
    """`torch.equal` up to what the kernels round otherwise, relative to the largest value."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point() or a.dtype == torch.float64 or not a.numel():
        return EQUAL(a, b)
    rounding = max(rounding, 2 * torch.finfo(a.dtype).eps)
    scale = max(1.0, float(b.double().abs().nan_to_num(0.0, 0.0, 0.0).max()))
    return torch.allclose(a, b, rtol=rounding, atol=rounding * scale, equal_nan=True)


EQUAL = torch.equal
