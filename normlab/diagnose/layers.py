"""The table of a diagnosis: a row for every batch norm."""

import math
from dataclasses import dataclass

from normlab.diagnose.case import Case
from normlab.diagnose.domains import Target
from normlab.diagnose.thresholds import NEGLIGIBLE

__all__ = ["Layer", "table"]


@dataclass(frozen=True)
class Layer:
    """One batch norm, its stored statistics against precise ones; NaN where there are none.

    positions: elements of a sample and channel. spread: distance of the means in units of the
    scatter of a batch's mean at the NBS in use; deviations: in standard deviations (both root mean
    squares over channels). ratio: stored / precise variance, geometric mean; low, high: its
    smallest and largest. distance: squared, as `comparison` defines it. dead: channels whose
    variance is far below eps. momentum, updates: of the layer. target: distance of the target's
    statistics from the data's.
    """

    name: str
    kind: str
    channels: int
    positions: int
    uses: int
    eps: float
    momentum: float
    updates: int
    spread: float
    deviations: float
    ratio: float
    low: float
    high: float
    distance: float
    dead: int
    target: float


def table(case: Case, target: Target | None) -> list[Layer]:
    """Rows of the layers that a forward reaches, those furthest from precise first; layers whose
    buffers are broken before all."""
    found = []
    for name, moments in case.moments.items():
        norm, layer, pair = case.norms[name], case.forwards.layers[name], case.pairs.get(name)
        momentum = getattr(norm, "momentum", None)
        updates = norm._buffers.get("num_batches_tracked")
        ratios = pair.log_ratio().exp() if pair else None
        found.append(
            Layer(
                name=name,
                kind=type(norm).__name__,
                channels=len(moments.samples.mean),
                positions=moments.positions,
                uses=case.uses[name],
                eps=layer.eps,
                momentum=math.nan if momentum is None else float(momentum),
                updates=0 if updates is None else int(updates),
                spread=math.sqrt(max(pair.in_spreads(), 0)) if pair else math.nan,
                deviations=pair.in_deviations() if pair else math.nan,
                ratio=pair.ratio() if pair else math.nan,
                low=float(ratios.min()) if ratios is not None else math.nan,
                high=float(ratios.max()) if ratios is not None else math.nan,
                distance=pair.far() if pair else math.nan,
                dead=int((moments.statistics().var < NEGLIGIBLE * layer.eps).sum()),
                target=target.far.get(name, math.nan) if target else math.nan,
            )
        )

    def order(row: Layer) -> tuple[bool, float]:
        return row.name not in case.broken, -row.distance if row.distance == row.distance else 0.0

    return sorted(found, key=order)
