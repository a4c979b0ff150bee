"""Evaluation protocols: which statistics one trained network is tested with.

A protocol is written ``<split>:<statistics>[/key:value]...``, for example ``val:ema`` or
``test:precise/batch:2/samples:1000``. ``normlab.evaluate`` carries them out.

================= ==================================================================================
statistics        the normalization layers use
================= ==================================================================================
augmented         (train only) nothing anew: the error of the epoch's own training forward
batch             the statistics of ``batch`` samples at a time, in the order that seed ``order``
                  draws; the remainder is dropped, and ``n`` records what was counted
ema               the stored running statistics; with ``decay`` those of the tracked bank, which
                  ``corrected:true`` rids of what is left in them of their initial values
adapted           population statistics pooled over ``samples`` images of the evaluated split's
                  first half that look as ``shift`` says, their labels unread: statistics of the
                  target, where the stored ones are those of the source
precise           population statistics pooled over ``samples`` training images in batches of
                  ``batch``
precise_mean      the same with the mean of the batch variances, as the original BN paper has it
precise_layerwise the same as precise layer by layer, each under the final statistics of those
                  before it: equal for every ``batch``, at about half a forward for every layer
================= ==================================================================================

``shift`` shows images as in a domain (``contrast-5``, see ``normlab.domains``) and counts those of
the split's second half, a class-blind one that is the same for all runs: ``shift:none`` is the same
images as they are, so that differences are between equal images. ``stats`` takes the statistics of
``adapted`` and of the precise ones (there of training images) from images of another domain than
those that are evaluated: ``test:adapted/shift:none/stats:contrast-5`` is the reverse direction.
Without it, precise statistics are of images as the run was trained on, all of its domains in turn.
``shift:each`` is the mean over the run's domains, ``stats:each`` beside it gives every one of them
its own statistics.

``batch`` is the run's NBS unless given. ``order`` is one of 0..999: the evaluator draws from the
stream ``seed * 1000 + order``, so that no two seeds share one. ``pattern`` is an order of training
(``16x2``, ``sorted`` within the run's SGD batch, see ``normlab.orders``; ``trained``: the one that
the run has) that the batches of an evaluation take; it is made from the labels that the network is
to guess: an oracle, which shows what leaks through the statistics and predicts nothing. Norms
without population statistics (those of a sample alone, and no norm), or with constant ones, behave
the same in training and at test: every protocol is their plain forward.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from normlab.domains import Domain
from normlab.orders import Order

SPLITS = ("train", "val", "test")
_ESTIMATED = ("batch", "samples", "order", "shift", "stats")
_KEYS = {
    "augmented": (),
    "batch": ("batch", "order", "pattern", "shift"),
    "ema": ("decay", "corrected", "shift"),
    "adapted": _ESTIMATED,
    "precise": _ESTIMATED,
    "precise_mean": _ESTIMATED,
    "precise_layerwise": _ESTIMATED,
}
STATISTICS = tuple(_KEYS)


EACH = "each"
"""In place of a domain: each of those that the run is trained on."""

TRAINED = "trained"
"""In place of an order: the one that the run is trained in."""

ORDERS = 1000
"""Orders of one seed: the stream of an order is ``seed * ORDERS + order``."""

# Half-open ranges: (lowest allowed, first not allowed, the two in words).
_RANGES = {
    "batch": (2, 2**31, "at least 2 and below 2**31"),
    "samples": (2, 2**31, "at least 2 and below 2**31"),
    "order": (0, ORDERS, f"one of 0..{ORDERS - 1}"),
    "decay": (0, 1, "at least 0 and below 1"),
}


@dataclass(frozen=True)
class Protocol:
    """One way to evaluate a checkpoint."""

    split: str
    statistics: str
    batch: int | None = None
    samples: int | None = None
    order: int = 0
    decay: float | None = None
    corrected: bool = False
    pattern: str | None = None
    shift: str | None = None
    stats: str | None = None

    @property
    def estimated(self) -> bool:
        """Whether population statistics are estimated for it."""
        return self.statistics == "adapted" or self.statistics.startswith("precise")

    @classmethod
    def parse(cls, spec: str) -> "Protocol":
        """Read ``<split>:<statistics>[/key:value]...``; ValueError says what is allowed."""
        head, *options = str(spec).split("/")
        split, _, statistics = head.partition(":")
        if split not in SPLITS or statistics not in STATISTICS:
            raise ValueError(
                f"evals: '{spec}' is not <split>:<statistics> with a split of {', '.join(SPLITS)} "
                f"and statistics of {', '.join(STATISTICS)}"
            )
        if statistics == "augmented" and split != "train":
            raise ValueError(f"evals: '{spec}': only train:augmented exists, the training forward")
        values: dict[str, Any] = {}
        for option in options:
            key, _, text = option.partition(":")
            if key not in _KEYS[statistics] or key in values:
                allowed = ", ".join(_KEYS[statistics]) or "none"
                raise ValueError(f"evals: '{spec}': option '{option}' (allowed, once: {allowed})")
            read = _READ.get(key)
            values[key] = read(spec, text) if read else _number(spec, key, text)
        if "corrected" in values and "decay" not in values:
            raise ValueError(
                f"evals: '{spec}': corrected needs /decay:<d>, which ema_bank tracks: the layers' "
                "own decay, too, has to be one of these"
            )
        if statistics == "adapted":
            if "shift" not in values:
                raise ValueError(f"evals: '{spec}': adapted needs /shift:<domain>, the target")
            if values.get("stats") == values["shift"]:
                del values["stats"]  # its own already
        if values.get("stats") == EACH != values.get("shift"):
            raise ValueError(f"evals: '{spec}': stats:{EACH} is for shift:{EACH}")
        protocol = cls(split, statistics, **values)
        made_of = protocol.stats or (protocol.shift if statistics == "adapted" else None)
        if made_of not in (None, EACH) and Domain.parse(str(made_of)).adversarial:
            raise ValueError(
                f"evals: '{spec}': no statistics of {made_of}, whose images are made for statistics"
            )
        return protocol

    def of_each(self, domains: Iterable[Domain]) -> list["Protocol"]:
        """What ``each`` stands for: this protocol for every domain, with the statistics it says.

        Raises ValueError for statistics of adversarial domains.
        """
        named = []
        for domain in map(str, domains):
            stats = domain if self.stats == EACH else self.stats
            named.append(replace(self, shift=domain, stats=stats))
        return [Protocol.parse(str(protocol)) for protocol in named]

    def __str__(self) -> str:
        options: dict[str, float | str | None] = {
            "batch": self.batch,
            "samples": self.samples,
            "decay": self.decay,
            "corrected": "true" if self.corrected else None,
        }
        if self.order:
            options["order"] = self.order
        options |= {"pattern": self.pattern, "shift": self.shift, "stats": self.stats}
        return f"{self.split}:{self.statistics}" + "".join(
            f"/{key}:{value}" for key, value in options.items() if value is not None
        )


def _pattern(spec: str, text: str) -> str | None:
    """The order's name, None for the usual one."""
    if text == TRAINED:
        return TRAINED
    try:
        name = Order.parse(text).name
    except ValueError:
        raise ValueError(
            f"evals: '{spec}': pattern must be {TRAINED}, shuffled, sorted or <labels>x<samples of"
            f" each>, such as 16x2, got pattern:{text}"
        ) from None
    return None if name == "shuffled" else name


def _domain(spec: str, text: str) -> str:
    try:
        return EACH if text == EACH else str(Domain.parse(text))
    except ValueError as error:
        raise ValueError(f"evals: '{spec}': {error}") from None


def _true(spec: str, text: str) -> bool:
    if text != "true":
        raise ValueError(f"evals: '{spec}': corrected must be true, or left out, got '{text}'")
    return True


def _number(spec: str, key: str, text: str) -> float | int:
    low, high, allowed = _RANGES[key]
    try:
        value = float(text) if key == "decay" else int(text)
    except ValueError:
        raise ValueError(f"evals: '{spec}': {key} must be a number, got '{text}'") from None
    if not low <= value < high:
        raise ValueError(f"evals: '{spec}': {key} must be {allowed}, got {key}:{text}")
    return value


_READ: dict[str, Callable[[str, str], Any]] = {
    "corrected": _true,
    "pattern": _pattern,
    "shift": _domain,
    "stats": _domain,
}
"""How the text of an option is read that is no number."""
