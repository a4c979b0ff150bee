"""Names the orders of training: how an epoch's samples come together in batches.

=========== ========================================================================================
order       an SGD batch is
=========== ========================================================================================
shuffled    drawn at random: the next samples of a permutation
sorted      the samples of the shuffled one in the order of their labels: i.i.d. for SGD, correlated
            for normalization batches that are parts of it
<L>x<S>     whole groups of exactly L labels with S samples each, for example 16x2
=========== ========================================================================================

Fig. 8 of "Rethinking 'Batch' in BatchNorm" trains on groups of 16x2: a network learns to look for
the partner of each sample in its normalization batch, and fails where there is none. With
``sorted`` a part of the batch is known by the labels that it mixes, always neighbours; and where
micro-batches are accumulated (norm=bn), the EMA ends with the highest labels: norm=ghost averages.
``normlab.data.patterns`` draws the orders.
"""

import re
from dataclasses import dataclass

_PATTERN = re.compile(r"([1-9][0-9]{0,8})x([1-9][0-9]{0,8})")


@dataclass(frozen=True)
class Order:
    """One order of training. ``labels`` and ``samples`` are L and S of a pattern, else 1."""

    name: str = "shuffled"
    labels: int = 1
    samples: int = 1

    @classmethod
    def parse(cls, spec: str) -> "Order":
        """Read ``shuffled``, ``sorted`` or ``<L>x<S>``; ValueError says what is allowed."""
        if spec in ("shuffled", "sorted"):
            return cls(spec)
        found = _PATTERN.fullmatch(spec)
        if not found or spec == "1x1":
            raise ValueError(
                "order must be shuffled, sorted or <labels>x<samples of each>, such as 16x2, got"
                f" order={spec}"
            )
        return cls(spec, int(found[1]), int(found[2]))

    @property
    def patterned(self) -> bool:
        """Whether the order consists of groups of ``labels`` times ``samples``."""
        return self.group > 1

    @property
    def group(self) -> int:
        """Samples of one group of the pattern; 1 without a pattern."""
        return self.labels * self.samples

    def __str__(self) -> str:
        return self.name


SHUFFLED = Order()
