"""What a diagnosis can find: every name with its meaning, in this one place."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["ADAPT", "AVERAGE", "MEANINGS", "RECALIBRATE", "Finding", "Severity", "verdict"]

RECALIBRATE = "`normlab recalibrate`"
ADAPT = "`normlab recalibrate --adapt`"
AVERAGE = "`normlab recalibrate --average`"
"""Of the cures by other statistics; a command line puts its own options into them."""

Severity = Literal["problem", "notice"]

MEANINGS: Mapping[str, str] = {
    # Why the stored statistics are not those of the network and the data; at most one of these
    # is reported for a model, the one that the evidence is for.
    "never_updated": "mean exactly 0 and variance exactly 1: no batch ever moved the statistics",
    "momentum_too_small": "stored = a initial + (1 - a) precise: too few updates for the decay",
    "momentum_reversed": "the statistics are about those of the last one or two batches",
    "eps_mismatch": "the statistics fit those of the network with another eps",
    "biased_variance": "the variance is short (or long) by (n - 1) / n of a batch of few elements",
    "not_a_variance": "the buffer holds a power of the variance: a standard deviation, an inverse",
    "common_factor": "means and variances of all layers are off by one and the same factor",
    "other_domain": "the statistics are of other inputs: shifted where only the first layer acts",
    "averaged_weights": "the weights are an average, and the statistics are of one of its parts",
    "stale_statistics": "the weights moved after the statistics were made",
    # Facts of the buffers, defects in themselves.
    "not_finite": "NaN or infinity in the buffers",
    "negative_variance": "a running variance below zero",
    "zeroed": "mean exactly 0 and variance exactly 0: an estimate over no batches",
    "ranks_disagree": "the checkpoints of several ranks hold different statistics (needs states)",
    "double_update": "some layers count, or make, two updates for every forward of a step",
    # Facts of the model and its training.
    "no_running_statistics": "track_running_stats is off: every evaluation uses its batch",
    "momentum_zero": "momentum is 0: the statistics never move",
    "frozen_but_updating": "no gradient reaches weight and bias, but train() moves the statistics",
    "used_twice": "a layer is used several times in a forward: one set of statistics for all",
    "never_used": "a layer is not reached by a forward",
    "dead_channels": "channels whose variance is far below eps",
    "bias_before_norm": "a bias in front of a batch norm, which subtracts it again",
    "weight_decay_on_norm": "weight decay reached the norms' weight and bias (needs optimizer)",
    "fused_layers": "norms were folded into the layers before them",
    "no_batch_norm": "the model has no batch norm to diagnose",
    "counts_differ": "layers count different numbers of updates",
    # How the model meets its data.
    "train_test_gap": "batch statistics at the NBS in use and the population's give other losses",
    "mixed_domains": "the data are of two kinds, and one set of statistics costs",
    "domain_shift": "the target's statistics are others, and adapting gains (needs target)",
    "batch_leakage": "batches of one label are easier than random ones: labels leak through them",
}
"""Of a name, what it means; `docs` and the page say it in these words."""


@dataclass(frozen=True)
class Finding:
    """Something that a diagnosis found.

    name: of MEANINGS. severity: "problem" where it costs something that was measured or is a defect
    whatever it costs, else "notice". layers: by name, the worst first; none: the model as a whole.
    sentence: one, with the numbers. evidence: these and further ones by name. cure: a command or a
    line of code between backticks, and words.
    """

    name: str
    severity: Severity
    layers: list[str]
    sentence: str
    evidence: dict[str, float | str] = field(default_factory=dict)
    cure: str = ""

    def __post_init__(self) -> None:
        if self.name not in MEANINGS:
            raise ValueError(f"{self.name!r} is no finding; these are: {', '.join(MEANINGS)}")


def verdict(findings: Sequence[Finding]) -> str:
    """In one line: "healthy", "healthy; 2 notices: a, b", "1 problem: c; 1 notice: d"."""
    said = []
    for severity in ("problem", "notice"):
        names = [finding.name for finding in findings if finding.severity == severity]
        if names:
            plural = "s" * (len(names) > 1)
            said.append(f"{len(names)} {severity}{plural}: {', '.join(names)}")
    if not any(finding.severity == "problem" for finding in findings):
        said.insert(0, "healthy")
    return "; ".join(said)
