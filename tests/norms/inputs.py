"""What the layers' tests are given: shapes, precisions, memory layouts, weights."""

import pytest
import torch
from torch import Tensor, nn

LAYOUTS = ["contiguous", "channels_last", "permuted", "sliced"]
SHAPES = [(8, 6), (8, 6, 5), (8, 6, 4, 3), (8, 6, 2, 3, 2)]


def cases(dtypes=(torch.float32, torch.bfloat16), shapes=SHAPES):
    """Parametrizes (shape, dtype, layout): float64 in every shape and layout, `dtypes` in some.

    What precision chooses among, it chooses by layout, and 5 dimensions are 3 with more positions.
    """
    everywhere = [(s, t) for s in shapes for t in LAYOUTS if (len(s), t) != (2, "channels_last")]
    routes = [
        (SHAPES[0], "contiguous"), (SHAPES[1], "permuted"), (SHAPES[3], "channels_last"),
        (SHAPES[2], "contiguous"), (SHAPES[2], "channels_last"), (SHAPES[2], "sliced"),
    ]  # fmt: skip
    found = [(shape, torch.float64, layout) for shape, layout in everywhere]
    found += [(s, dtype, t) for dtype in dtypes for s, t in routes if s in shapes]
    names = ["x".join(map(str, s)) + f"-{str(d)[6:]}-{t}" for s, d, t in found]
    return pytest.mark.parametrize(("shape", "dtype", "layout"), found, ids=names)


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The values of x in another memory layout."""
    if layout == "contiguous":
        return x.contiguous()
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "permuted":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    wider = torch.full((x.size(0), 2 * x.size(1), *x.shape[2:]), 7.0, dtype=x.dtype)
    wider[:, ::2] = x
    return wider[:, ::2]


def random_affine(layer: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in layer.parameters():
            values = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(values + 0.5)
