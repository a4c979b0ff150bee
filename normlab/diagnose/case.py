"""All that the checks of a diagnosis look at: the model, its data, and what was measured."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from normlab.diagnose.comparison import Pair
from normlab.diagnose.findings import Severity
from normlab.diagnose.forwards import Forwards, Losses
from normlab.diagnose.live import Live, norms_of
from normlab.diagnose.moments import Moments
from normlab.diagnose.thresholds import COSTLY_ERROR, COSTLY_LOSS, FAR
from normlab.population import Population

__all__ = ["Case", "Numbers", "costs"]

Numbers = dict[str, float | str]


def costs(worse: Losses, better: Losses) -> bool:
    """Whether `worse` is: beyond chance, and by more than healthy networks vary."""
    higher = worse.loss - better.loss
    less = higher <= COSTLY_LOSS * max(better.loss, FAR)  # a NaN is worse
    more_errors = worse.error - better.error > COSTLY_ERROR
    if worse.beyond_chance(better) and (not less or more_errors):
        return True
    return more_errors and worse.more_errors_than(better)


@dataclass
class Case:
    """What the checks look at. Losses are on the training data, batch by batch."""

    model: nn.Module
    forwards: Forwards
    batches: Iterable[Any]
    some: list[Any]
    """The first few batches, held."""
    nbs: int
    optimizer: Mapping[str, Any] | None
    states: Sequence[Mapping[str, Tensor]]
    live: Live | None
    uses: Counter[str]
    """Of each layer in one forward of the model in eval mode."""
    moments: dict[str, Moments]
    """Of every layer that a forward reached, in the order in which it did."""
    pairs: dict[str, Pair]
    """Of those whose stored statistics are numbers that can be compared."""
    precise: Population
    with_stored: Losses
    with_precise: Losses
    with_batch: Losses
    tested: tuple[Losses, Losses] | None = None
    """On held-out data, where there are any: with stored and with precise statistics."""
    broken: set[str] = field(default_factory=set)
    """Layers whose buffers are defective, as a finding has said."""

    @property
    def norms(self) -> dict[str, nn.Module]:
        return norms_of(self.model)

    @property
    def stored_costs(self) -> bool:
        """Whether the stored statistics cost something against precise ones, on either data.

        A network that fits its training data may show a cost on held-out data alone.
        Without labels: whether the layers are far from them.
        """
        if self.with_precise.loss == self.with_precise.loss:  # not NaN
            return costs(self.with_stored, self.with_precise) or (
                self.tested is not None and costs(*self.tested)
            )
        return self.far > FAR

    def severity(self, *, defect: bool = False) -> Severity:
        """Of a cause: a problem where the statistics cost something, or it is a defect anyway."""
        return "problem" if defect or self.stored_costs else "notice"

    @property
    def counts(self) -> list[int]:
        """The updates that the layers count, of those that do."""
        counts = [norm._buffers.get("num_batches_tracked") for norm in self.norms.values()]
        return [int(count) for count in counts if count is not None]

    @property
    def far(self) -> float:
        """Mean distance of the stored statistics over the layers."""
        each = [pair.far() for pair in self.pairs.values()]
        return sum(each) / len(each) if each else 0.0

    def worst(self, names: Iterable[str] | None = None) -> list[str]:
        """Layers by their distance, the furthest first."""
        chosen = self.pairs if names is None else [name for name in names if name in self.pairs]
        return sorted(chosen, key=lambda name: -self.pairs[name].far())

    def in_numbers(self) -> Numbers:
        """Loss and error of the three, where there are labels."""
        found: Numbers = {}
        for name, losses in (
            ("stored", self.with_stored),
            ("precise", self.with_precise),
            ("batch", self.with_batch),
        ):  # fmt: skip
            found[f"loss with {name} statistics"] = losses.loss
            found[f"error with {name} statistics"] = losses.error
        return found

    def said(self) -> str:
        """For a sentence: what the stored statistics cost."""
        if self.with_precise.loss != self.with_precise.loss:
            return f"a mean distance of {self.far:.2g} (no labels tell what it costs)"
        stored, precise = self.with_stored, self.with_precise
        words = f"loss {stored.loss:.3g} with stored and {precise.loss:.3g} with precise statistics"
        if precise.error == precise.error:
            words += f", error {100 * stored.error:.1f} % and {100 * precise.error:.1f} %"
        return words
