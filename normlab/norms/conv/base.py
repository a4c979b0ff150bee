"""A convolution whose filters are a function of its parameters; how it takes another's place."""

from typing import Any, Self

from torch import Tensor, nn

from normlab.norms._hooks import move_hooks

__all__ = ["ReparametrizedConv2d", "replace"]


class ReparametrizedConv2d(nn.Conv2d):
    """torch.nn.Conv2d with `filters()` in place of its weight; arguments, shapes, errors are its.

    Not torch's parametrization: `weight` stays a parameter of its own name in the state_dict, so
    that an initialization, an optimizer and a checkpoint of plain convolutions find it.
    """

    def filters(self) -> Tensor:
        """What is convolved with, in the shape of `weight`: (O, I / groups, kh, kw)."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """(N, I, H, W) to (N, O, H', W')."""
        y: Tensor = self._conv_forward(input, self.filters(), self.bias)
        return y

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, **options: Any) -> Self:
        """A layer with the parameters of `conv`: the same objects, nothing drawn or copied."""
        arguments: tuple[Any, ...] = (
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding,
            conv.dilation, conv.groups, conv.bias is not None, conv.padding_mode, "meta",
        )  # fmt: skip
        made = cls(*arguments, **options)
        made.weight = conv.weight
        made.bias = conv.bias
        made.train(conv.training)
        made._adopt()
        return made

    def _adopt(self) -> None:
        """Bring further parameters in line with a weight that was just put in."""


def replace(model: nn.Module, kind: type[ReparametrizedConv2d], **options: Any) -> nn.Module:
    """`model` with every torch.nn.Conv2d as a `kind` with the same parameters, in place.

    Hooks stay, with working handles. Subclasses of Conv2d are left alone; a convolution that is
    used in several places stays one. Returns the new layer if `model` itself is a convolution.
    """
    made: dict[nn.Module, nn.Module] = {
        module: kind.from_conv(module, **options)
        for module in model.modules()
        if type(module) is nn.Conv2d
    }
    for conv, new in made.items():
        move_hooks(conv, new)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in made:
                setattr(parent, name, made[child])
    return made.get(model, model)
