"""Hooks that go with a layer's place when another layer takes it."""

import weakref

from torch import nn

__all__ = ["move_hooks"]

_HOOKS = sorted(
    name for name in vars(nn.Module()) if name.endswith(("_hooks", "_with_kwargs", "_called"))
)


def move_hooks(old: nn.Module, new: nn.Module) -> None:
    """The dictionaries themselves go over: a handle removes its hook from the one it knows."""
    for name in _HOOKS:
        hooks = getattr(old, name)
        hooks.update(getattr(new, name))
        vars(new)[name] = hooks
        for hook in hooks.values():
            if getattr(hook, "with_module", False):  # it is called with the module it belongs to
                hook.module = weakref.ref(new)
    vars(new)["_is_full_backward_hook"] = old._is_full_backward_hook
