"""Contestants that take turns on a clock: what disturbs the machine disturbs all of them."""

import math
import time
from collections.abc import Callable

__all__ = ["FEWEST", "Measured", "take_turns"]

Measured = dict[str, list[float]]
"""Contestant -> seconds, one per round."""

FEWEST = 3
"""Rounds of which a median is taken at least, where time is short."""


def take_turns(
    contestants: dict[str, Callable[[], object]],
    rounds: int,
    *,
    clock: Callable[[], float] = time.process_time,
    seconds: float = math.inf,
) -> Measured:
    """Seconds of each contestant in each round, after one round that does not count.

    The order is reversed in every other round, so that none always follows the same one. No further
    round begins when `seconds` have passed, but there are three (or `rounds`, if that is less).
    """
    taken: Measured = {name: [] for name in contestants}
    end = time.perf_counter() + seconds
    for number in range(rounds + 1):
        if number > FEWEST and time.perf_counter() > end:
            break
        names = list(contestants)
        for name in names if number % 2 else reversed(names):
            started = clock()
            contestants[name]()
            if number:
                taken[name].append(clock() - started)
    return taken
