"""How a normalization batch is formed: the arithmetic of NBS, checked before anything runs.

NBS is the number of samples that share one set of statistics. From the SGD batch, the NBS and the
number of ranks a plan derives what each rank does in one step, or refuses with one line that names
both numbers and the nearest choices that work. Nothing is rounded and no norm is switched: a chunk
of another size would be another experiment, and one of a single sample is instance norm.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from math import isqrt, lcm

BATCHES = ("per_rank", "ghost", "sync", "virtual", "none")
"""How a norm forms its batch: `per_rank` over a rank's micro-batch, `ghost` over chunks of it,
`sync` over the micro-batches of a group of ranks, `virtual` over a micro-batch and extra
forward-only samples, `none` over no other sample."""

MOST = 2**31 - 1
"""The largest number of anything."""


class PlanError(ValueError):
    """A batch that cannot be formed.

    ``choices`` maps an argument's name to values near the refused one. Each of them is accepted
    when it replaces that argument and the others stay.
    """

    def __init__(self, message: str, choices: dict[str, list[int]] | None = None) -> None:
        super().__init__(message)
        self.choices = choices or {}


@dataclass(frozen=True)
class BatchPlan:
    """One step of SGD, taken apart.

    ``batch_size = world_size * accumulation * micro_batch`` always, and except for ``none``
    ``nbs = micro_batch * sync_group / ghost_chunks + virtual_extra``.
    """

    batch_size: int
    """Samples behind one step of SGD, over all ranks."""
    nbs: int | None
    """Samples that share one set of statistics; None where no sample sees another."""
    world_size: int
    """Ranks."""
    batch: str
    """One of BATCHES."""
    micro_batch: int
    """Samples per rank and forward pass that give gradients."""
    accumulation: int
    """Forward and backward passes per rank and step."""
    ghost_chunks: int
    """Groups of nbs samples inside a micro-batch."""
    sync_group: int
    """Ranks that share one set of statistics."""
    virtual_extra: int
    """Samples per forward pass that only add to the statistics."""
    asked: tuple[int | None, ...] = field(default=(None, None, None), compare=False, repr=False)
    """The nbs, micro_batch and sync_group_size that the plan was made from: what another batch size
    has to fit."""

    def parts(self, rank: int) -> list[range]:
        """A rank's micro-batches in their order, as places in the SGD batch.

        What shares statistics is nbs consecutive places of the SGD batch, whatever forms it: a rank
        takes consecutive micro-batches, and the ranks of a sync group take turns.
        """
        group, turn = divmod(rank, self.sync_group)
        together = self.micro_batch * self.sync_group
        first = group * self.accumulation * together + turn * self.micro_batch
        starts = range(first, first + self.accumulation * together, together)
        return [range(start, start + self.micro_batch) for start in starts]

    def rows(self) -> list[tuple[str, str, str]]:
        """(key, value, meaning) for every quantity, in the order in which a step is taken apart."""
        rows: list[tuple[str, int | None, str]] = [
            ("batch_size", self.batch_size, "samples behind one step of SGD"),
            ("world_size", self.world_size, "ranks"),
            ("accumulation", self.accumulation, "forward and backward passes per rank and step"),
            ("micro_batch", self.micro_batch, "samples per rank and forward pass"),
        ]
        if self.batch == "ghost":
            rows.append(("ghost_chunks", self.ghost_chunks, "groups inside a micro-batch"))
        if self.batch == "sync":
            rows.append(("sync_group", self.sync_group, "ranks that share their statistics"))
        if self.batch == "virtual":
            extra = "samples per forward pass that only add to the statistics"
            rows.append(("virtual_extra", self.virtual_extra, extra))
        rows.append(("nbs", self.nbs, "samples that share one set of statistics"))
        return [(key, "-" if value is None else str(value), text) for key, value, text in rows]


def plan(
    batch_size: int,
    nbs: int | None,
    *,
    world_size: int = 1,
    batch: str = "per_rank",
    norm: str = "bn",
    micro_batch: int | None = None,
    sync_group_size: int | None = None,
) -> BatchPlan:
    """Take one step of SGD apart, or raise PlanError.

    batch_size: samples behind one step, over all ranks. nbs: samples that share one set of
    statistics; None takes the whole micro-batch for `per_rank` and that of all ranks for `sync`,
    and is refused by `ghost` and `virtual`. batch: how the norm called `norm` forms its batch, one
    of BATCHES. micro_batch: samples per rank and forward pass; None takes as many as the plan
    allows. sync_group_size: for `sync`, the ranks of a group, consecutive ones; None takes as few
    as give the nbs, and all ranks without one.
    """
    if batch not in BATCHES:
        raise PlanError(
            f"norm={norm}: norm.batch must be one of {', '.join(BATCHES)}, got norm.batch={batch}"
        )

    def solve(
        batch_size: int,
        nbs: int | None,
        micro_batch: int | None,
        group: int | None = sync_group_size,
    ) -> BatchPlan:
        return _solve(batch_size, nbs, world_size, batch, norm, micro_batch, group)

    try:
        return solve(batch_size, nbs, micro_batch)
    except PlanError as refusal:
        numbers = (batch_size, world_size, nbs or 1, micro_batch or 1, sync_group_size or 1)
        if any(not 1 <= n <= MOST for n in numbers):
            raise
        choices = {
            "nbs": _nearest(
                nbs,
                [*_divisors(batch_size), micro_batch or 2],
                lambda n: solve(batch_size, n, micro_batch),
            ),
            "batch_size": _nearest(
                batch_size,
                _multiples(batch_size, world_size * lcm(nbs or 1, micro_batch or 1)),
                lambda n: solve(n, nbs, micro_batch),
            ),
            "micro_batch": []
            if micro_batch is None
            else _nearest(micro_batch, _divisors(batch_size), lambda n: solve(batch_size, nbs, n)),
            "sync_group_size": []
            if sync_group_size is None
            else _nearest(
                sync_group_size,
                _divisors(world_size),
                lambda n: solve(batch_size, nbs, micro_batch, n),
            ),
        }
        raise PlanError(str(refusal) + _spelled(choices), choices) from None


def _solve(
    batch_size: int,
    nbs: int | None,
    world_size: int,
    batch: str,
    norm: str,
    micro_batch: int | None,
    sync_group_size: int | None,
) -> BatchPlan:
    """The plan, or a refusal that does not yet say what would work."""
    asked = (nbs, micro_batch, sync_group_size)
    for name, value in (
        ("batch_size", batch_size),
        ("world_size", world_size),
        ("nbs", nbs),
        ("micro_batch", micro_batch),
        ("sync_group_size", sync_group_size),
    ):
        least = 2 if name == "nbs" else 1
        if value is not None and not least <= value <= MOST and (name, value) != ("nbs", 1):
            raise PlanError(
                f"{name} must be at least {least} and at most {MOST}, got {name}={value}"
            )
    if batch == "none" and nbs is not None:
        raise PlanError(
            f"norm={norm} looks at no other sample and takes no nbs, got nbs={nbs}: leave it out"
        )
    if batch != "sync" and sync_group_size is not None:
        raise PlanError(
            f"norm={norm} shares no statistics between ranks and takes no sync_group_size, got"
            f" sync_group_size={sync_group_size}: leave it out, or use norm=sync"
        )
    if batch in ("ghost", "virtual") and nbs is None:
        raise PlanError(
            f"norm={norm} needs nbs, the number of samples that share one set of statistics"
        )
    if nbs == 1:
        raise PlanError(
            f"norm={norm}: nbs=1 is instance norm, not batch norm: use norm=in, or nbs=2 or more"
        )
    if batch_size % world_size:
        raise PlanError(f"world_size={world_size} does not divide batch_size={batch_size}")
    per_rank = batch_size // world_size
    if micro_batch is not None and per_rank % micro_batch:
        raise PlanError(
            f"micro_batch={micro_batch} does not divide {_share(batch_size, world_size)}"
        )

    micro, chunks, ranks, extra = _form(
        per_rank, nbs, world_size, batch, micro_batch, sync_group_size,
        _share(batch_size, world_size),
    )  # fmt: skip
    if batch != "none" and nbs is None:
        nbs = micro * ranks
        if nbs == 1:
            raise PlanError(
                f"batch_size={batch_size} over world_size={world_size} leaves norm={norm} one"
                " sample at a time (nbs=1), which is instance norm: use norm=in, or a larger batch"
            )
    return BatchPlan(
        batch_size=batch_size,
        nbs=nbs,
        world_size=world_size,
        batch=batch,
        micro_batch=micro,
        accumulation=per_rank // micro,
        ghost_chunks=chunks,
        sync_group=ranks,
        virtual_extra=extra,
        asked=asked,
    )


def _form(
    per_rank: int,
    nbs: int | None,
    world_size: int,
    batch: str,
    micro_batch: int | None,
    sync_group_size: int | None,
    share: str,
) -> tuple[int, int, int, int]:
    """(micro_batch, ghost_chunks, sync_group, virtual_extra) of one way to form the batch."""
    whole = micro_batch or per_rank
    if batch == "none" or (batch == "per_rank" and nbs is None):
        return whole, 1, 1, 0
    if sync_group_size is not None and world_size % sync_group_size:
        raise PlanError(
            f"sync_group_size={sync_group_size} does not divide world_size={world_size}"
        )
    if batch == "sync" and nbs is None:
        return whole, 1, sync_group_size or world_size, 0
    assert nbs is not None
    if batch == "per_rank":  # accumulation: each forward pass is one normalization batch
        if per_rank % nbs:
            raise PlanError(f"nbs={nbs} does not divide {share}")
        if micro_batch not in (None, nbs):
            raise PlanError(
                f"micro_batch={micro_batch} differs from nbs={nbs}, but this norm's statistics are"
                " its micro-batch's: leave micro_batch out, or use norm=ghost"
            )
        return nbs, 1, 1, 0
    if batch == "ghost":
        if whole % nbs:
            where = share if micro_batch is None else f"micro_batch={micro_batch}"
            raise PlanError(f"nbs={nbs} does not divide {where}")
        return whole, whole // nbs, 1, 0
    if batch == "sync":
        # The largest micro-batch whose multiple by a divisor of the ranks is the nbs.
        for micro in [micro_batch] if micro_batch else reversed(_divisors(per_rank)):
            group = nbs // micro
            fits = nbs % micro == 0 and world_size % group == 0
            if fits and sync_group_size in (None, group):
                return micro, 1, group, 0
        where = f"micro_batch={micro_batch}" if micro_batch else share
        group_of = f"sync_group_size={sync_group_size}" if sync_group_size else "a group"
        raise PlanError(
            f"nbs={nbs} cannot be split over {group_of} of the {world_size} ranks: {where}"
        )
    fitting = [d for d in ([micro_batch] if micro_batch else _divisors(per_rank)) if d <= nbs]
    if not fitting:
        raise PlanError(f"nbs={nbs} is smaller than micro_batch={micro_batch}")
    return fitting[-1], 1, 1, nbs - fitting[-1]


def steps(n: int, plan: BatchPlan, remainder: str = "drop") -> tuple[int, int]:
    """(SGD steps, samples left out) of one epoch over n samples.

    Every step has exactly ``plan.batch_size`` samples. remainder: `drop` leaves the last n mod
    batch_size samples of an epoch's order out, `error` refuses. Raises PlanError also where no step
    is left.
    """
    if remainder not in ("drop", "error"):
        raise PlanError(f"remainder must be drop or error, got remainder={remainder}")
    size, (nbs, micro_batch, group) = plan.batch_size, plan.asked
    count, dropped = divmod(n, size)

    def works(other: int) -> None:
        if not 1 <= other <= n or (remainder == "error" and n % other):
            raise PlanError("leaves a remainder")
        _solve(other, nbs, plan.world_size, plan.batch, "", micro_batch, group)

    if count > 0 and not (dropped and remainder == "error"):
        return count, dropped
    unit = plan.world_size * lcm(nbs or 1, micro_batch or 1)
    candidates = [*_divisors(n), *_multiples(n, unit)] if n > 0 else []
    choices = {"batch_size": _nearest(size, candidates, works)}
    said = f"batch_size={size} leaves {dropped} of {n} training samples over (remainder=error)"
    if count < 1:
        said = f"batch_size={size} is more than the {n} training samples, which leaves no step"
    raise PlanError(said + _spelled(choices), choices)


def _share(batch_size: int, world_size: int) -> str:
    if world_size == 1:
        return f"batch_size={batch_size}"
    each = batch_size // world_size
    return f"the {each} samples per rank (batch_size={batch_size}, world_size={world_size})"


@lru_cache(maxsize=8)
def _divisors(n: int) -> tuple[int, ...]:
    """Ascending."""
    low = [d for d in range(1, isqrt(n) + 1) if n % d == 0]
    return (*low, *(n // d for d in reversed(low) if d * d != n))


def _multiples(n: int, unit: int) -> list[int]:
    """The positive multiples of a unit that enclose n."""
    return [m for m in (n // unit * unit, (n // unit + 1) * unit) if m > 0]


def _nearest(
    value: int | None, candidates: Iterable[int], attempt: Callable[[int], object]
) -> list[int]:
    """The nearest candidates below and above a value for which the attempt does not refuse."""
    works = []
    for candidate in sorted(set(candidates)):
        try:
            attempt(candidate)
        except PlanError:
            continue
        works.append(candidate)
    if value is None:
        return works[-2:]
    return [c for c in works if c < value][-1:] + [c for c in works if c > value][:1]


def _spelled(choices: dict[str, list[int]]) -> str:
    said = [f"{key}={' or '.join(map(str, values))}" for key, values in choices.items() if values]
    return f" (works: {'; '.join(said)})" if said else ""
