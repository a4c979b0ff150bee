"""What a model's outputs are worth: loss and error, as sums over samples."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from normlab import dist
from normlab.subject.batches import Batches, samples_of

__all__ = ["Score", "Scoring", "check", "measure"]

Loss = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Score:
    """Sums over `n` samples: of errors (each in [0, 1]) and of losses; None: not known."""

    n: int
    error_sum: float | None
    loss_sum: float | None

    @property
    def error(self) -> float | None:
        """The mean error in %."""
        return None if self.error_sum is None or self.n == 0 else 100 * self.error_sum / self.n

    @property
    def loss(self) -> float | None:
        """The mean loss of a sample."""
        return None if self.loss_sum is None or self.n == 0 else self.loss_sum / self.n

    def __add__(self, other: "Score") -> "Score":
        """Of both together; what one does not know is not known."""
        return Score(
            self.n + other.n,
            _sum(self.error_sum, other.error_sum),
            _sum(self.loss_sum, other.loss_sum),
        )


class Scoring:
    """How to run a model on a batch, and what its outputs are worth.

    Args:
        forward: called as forward(model, batch), returns the outputs. By default model(batch[0])
            for a tuple or list, else model(batch).
        loss: called as loss(outputs, batch), returns the batch's mean loss (a tensor or a number),
            or (mean loss, mean error in [0, 1]). By default cross-entropy and the share of wrong
            classes, for batches (x, y) with whole-number labels y (N,) and outputs (N, classes).
    """

    def __init__(
        self, *, forward: Callable[[nn.Module, Any], Any] | None = None, loss: Loss | None = None
    ) -> None:
        self._forward = forward
        self._loss = loss

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """The model's outputs on a batch."""
        if self._forward is not None:
            return self._forward(model, batch)
        return model(batch[0] if isinstance(batch, tuple | list) else batch)

    def score(self, outputs: Any, batch: Any) -> Score:
        """The sums of a batch.

        Raises ValueError for labels that the outputs have no class for, and for a loss that
        returns something else.
        """
        n = samples_of(batch)
        if self._loss is not None:
            loss, error = _numbers(self._loss(outputs, batch))
            return Score(n, None if error is None else n * error, n * loss)
        y = batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else None
        if not isinstance(y, Tensor) or y.dim() != 1 or y.is_floating_point():
            return Score(n, None, None)
        if not isinstance(outputs, Tensor) or outputs.dim() != 2:
            return Score(n, None, None)
        least, most = int(y.min()), int(y.max())
        if least < 0 or most >= outputs.size(1):
            raise ValueError(
                f"the labels go from {least} to {most}, and the model tells {outputs.size(1)} "
                "classes apart"
            )
        wrong = outputs.argmax(1).ne(y).sum()
        loss_sum = F.cross_entropy(outputs.double(), y.long(), reduction="sum")
        return Score(n, float(wrong), float(loss_sum))


def check(model: nn.Module, batches: Batches, scoring: Scoring) -> None:
    """Run `model` on one batch, without a trace.

    Raises ValueError in one line for what fails in it, as with images of a size that does not fit.
    """
    try:
        with torch.no_grad(), _evaluating(model):
            for batch in batches:
                scoring.score(scoring.forward(model, batch), batch)
                return
    except Exception as error:
        said = (str(error).splitlines() or [""])[0]
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"the model and a batch of {batches.name}: {kind}{said}") from error
    raise ValueError(f"{batches.name} has no batch")


def measure(
    model: nn.Module,
    batches: Iterable[Any],
    scoring: Scoring,
    *,
    progress: bool = True,
    label: str = "scoring",
) -> Score:
    """The score of `model` on `batches`, in eval mode without gradients; modes are put back.

    Several ranks score together: each has batches of its own, and all get the sums of all.
    """
    quiet = None if progress and dist.place()[0] == 0 else True
    total: Score | None = None
    with torch.no_grad(), _evaluating(model):
        for batch in tqdm(batches, desc=label, unit="batch", leave=False, disable=quiet):
            score = scoring.score(scoring.forward(model, batch), batch)
            total = score if total is None else total + score
    return _of_ranks(total, dist.home(model))


def _of_ranks(own: Score | None, device: torch.device) -> Score:
    """The sums of all ranks; one without batches knows nothing that the others do not."""
    nothing = own is None
    own = own or Score(0, 0.0, 0.0)
    values = (own.n, own.error_sum, own.loss_sum)
    held = [[0.0 if value is None else value, value is None] for value in values]
    n, error, loss = dist.stack(torch.tensor(held, dtype=torch.float64, device=device)).sum(0)
    if nothing and n[0] == 0:
        return Score(0, None, None)
    sums = [None if lacking else float(value) for value, lacking in (error, loss)]
    return Score(int(n[0]), *sums)


def _sum(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other


def _numbers(result: Any) -> tuple[float, float | None]:
    parts = result if isinstance(result, tuple | list) else (result, None)
    try:
        loss, error = (p.detach() if isinstance(p, Tensor) else p for p in parts)
        return float(loss), None if error is None else float(error)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            "a loss returns its mean over the batch, or (mean loss, mean error), not "
            f"{type(result).__name__}"
        ) from None


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode
