"""The choices of a batch norm: attributes of a layer, and the contexts that set them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import nn

__all__ = [
    "Choices",
    "Choosing",
    "Source",
    "check_update",
    "normalization",
    "own_choices",
    "refuse_strangers",
]

Source = Literal["batch", "population"]


class Choices(NamedTuple):
    """Three of the four choices of a batch norm (`PopulationNorm`); None: not made here."""

    statistics: Source | None = None
    update: bool | None = None
    group_size: int | None = None


@dataclass(frozen=True, eq=False)
class _Context:
    """One open context: what it chooses; alone: whatever is chosen in the contexts around it."""

    chooses: Choices
    alone: bool = False


def check_update(update: bool | None, statistics: Source | None) -> None:
    """Refuse an update by what the forward does not compute."""
    if update and statistics == "population":
        raise ValueError("update=True needs statistics='batch'; they are 'population'")


def _check(choices: Choices) -> None:
    if choices.statistics not in (None, "batch", "population"):
        raise ValueError(f"statistics is 'batch' or 'population', not {choices.statistics!r}")
    if choices.update not in (None, True, False):
        raise ValueError(f"update is True, False or None, not {choices.update!r}")
    check_update(choices.update, choices.statistics)
    if choices.group_size is not None and choices.group_size < 1:
        raise ValueError(f"group_size must be at least 1, not {choices.group_size}")


class Choosing(nn.Module):
    """A layer with the choices of a batch norm: the part of `PopulationNorm` that is about them.

    The attributes say what the next forward does. They belong to the layer's owner, who made or
    changed the layer; within `normalization` they are the context's, and `own` has the owner's.
    """

    # While contexts are open: the owner's choices, and the contexts, the innermost last.
    _owners: Choices | None = None
    _contexts: tuple[_Context, ...] = ()

    def __init__(self, statistics: Source | None, update: bool | None) -> None:
        super().__init__()
        _check(Choices(statistics, update))
        self.statistics = statistics
        self.update = update
        self.group_size: int | None = None

    @property
    def own(self) -> Choices:
        """The choices of the layer's owner, whatever contexts are open."""
        return self._owners or Choices(self.statistics, self.update, self.group_size)

    @property
    def frozen(self) -> bool:
        """Whether the layer's owner has set `statistics` to "population"; contexts leave it so."""
        return self.own.statistics == "population"

    @property
    def source(self) -> Source:
        """Which statistics a forward normalizes with now."""
        if self.statistics not in (None, "batch", "population"):
            raise ValueError(f"statistics is 'batch' or 'population', not {self.statistics!r}")
        return self.statistics or ("batch" if self.training else "population")

    @property
    def updates(self) -> bool:
        """Whether a forward that uses batch statistics moves the buffers now."""
        return self.training if self.update is None else self.update

    def _within(self, contexts: Sequence[_Context]) -> Choices:
        """The choices within these contexts, the innermost last."""
        chosen = self.own
        for context in contexts:
            around = self.own if context.alone else chosen
            made = {k: v for k, v in context.chooses._asdict().items() if v is not None}
            chosen = around._replace(**made)
        return chosen

    def _enter(self, contexts: tuple[_Context, ...]) -> None:
        """Choose as these contexts do; as the owner does where there are none."""
        chosen, own = self._within(contexts), self.own
        self._owners, self._contexts = (own if contexts else None), contexts
        self.statistics, self.update, self.group_size = chosen

    def __getstate__(self) -> dict[str, Any]:
        # A context is about this object: nobody would end it for a copy.
        return {**self.__dict__, **self.own._asdict(), "_owners": None, "_contexts": ()}


@contextmanager
def normalization(
    model: nn.Module,
    *,
    statistics: Source | None = None,
    update: bool | None = None,
    group_size: int | None = None,
) -> Iterator[None]:
    """Within the context, set these choices on every PopulationNorm of `model` that is not frozen.

    None leaves a choice as it is: as a context around this one has it, else as each layer's owner
    has it. An inner context overrides an outer one. A layer whose owner has set `statistics` to
    "population" is frozen and stays as it is. When a context ends, also by an exception and in
    whatever order, its choices end; what is assigned to a layer's attributes meanwhile ends with
    them. Copies of a layer have its owner's choices. A model without batch norms has nothing to
    set.

    Raises ValueError, before any change, for an unknown source, for an update that is no bool, for
    a group_size below 1, for update=True with population statistics, also where one of the two
    comes from around the context, and for a model with torch's own batch norms, which would go on
    as before: `normlab.convert` it first.
    """
    chooses = Choices(statistics, update, group_size)
    _check(chooses)
    refuse_strangers(model, "chosen")
    with _open(model, _Context(chooses)):
        yield


@contextmanager
def own_choices(model: nn.Module) -> Iterator[None]:
    """Within the context, every layer of `model` has its owner's choices again.

    So what follows does not depend on the contexts around it; those within it work as ever.
    """
    with _open(model, _Context(Choices(), alone=True)):
        yield


@contextmanager
def _open(model: nn.Module, context: _Context) -> Iterator[None]:
    layers = [v for v in model.modules() if isinstance(v, Choosing) and not v.frozen]
    for layer in layers:
        chosen = layer._within((*layer._contexts, context))
        check_update(chosen.update, chosen.statistics)
    try:
        for layer in layers:
            layer._enter((*layer._contexts, context))
        yield
    finally:
        for layer in layers:
            layer._enter(tuple(other for other in layer._contexts if other is not context))


def refuse_strangers(model: nn.Module, action: str) -> None:
    """ValueError for a batch norm of torch's in `model`, naming it: it knows nothing of choices.

    What was done to a part of the batch norms would pass for done to the whole model.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            raise ValueError(
                f"{name or 'the model'} is torch's {type(module).__name__}, whose statistics "
                f"cannot be {action} here: convert the model first (normlab.convert)"
            )
