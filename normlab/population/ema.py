"""Exponential moving averages in closed form: what is in one after some steps.

r_t = decay r_(t-1) + (1 - decay) b_t. Large decays are stale, small ones are noisy: for batches
that are independent draws about a mean, the error of r_T is the sum of what the initial value has
left (`ema_weights(decay, T)[0]`), of the noise of the batches (`ema_noise`), and, where the mean
moves by v a step, of `ema_age` times v.
"""

from math import ceil, log

__all__ = ["ema_age", "ema_noise", "ema_weights", "iterations_needed"]


def ema_weights(decay: float, steps: int) -> list[float]:
    """Weights of the initial value and of batches 1 to `steps`: d^T, then (1 - d) d^(T - t).

    They sum to 1. Raises ValueError for a decay outside [0, 1) and for negative steps.
    """
    _check(decay, steps)
    return [decay**steps, *((1 - decay) * decay ** (steps - t) for t in range(1, steps + 1))]


def ema_noise(decay: float, steps: int | None = None) -> float:
    """Variance of the average, in units of one batch's, for independent batches of one variance.

    The sum of the batches' squared weights, (1 - d) / (1 + d) (1 - d^(2T)); `steps` None: at the
    limit of many. The initial value counts as a constant. Raises ValueError as `ema_weights` does.
    """
    _check(decay, steps)
    forgotten = 1.0 if steps is None else 1 - decay ** (2 * steps)
    return (1 - decay) / (1 + decay) * forgotten


def ema_age(decay: float, steps: int | None = None, *, corrected: bool = False) -> float:
    """Mean age in steps of what the average holds, d (1 - d^T) / (1 - d); the newest batch has 0.

    The initial value is as old as the `steps`; None: at the limit of many. A mean that moves by v a
    step is v times the age ahead of its average. `corrected`: without the initial value
    (`EmaBank.population`), d / (1 - d) - T d^T / (1 - d^T), at most the (T - 1) / 2 of a plain
    average. Raises ValueError as `ema_weights` does, and for a corrected average of no steps.
    """
    _check(decay, steps)
    if corrected and steps == 0:
        raise ValueError("steps must be at least 1 for a corrected average, not 0")
    left = 0.0 if steps is None else decay**steps
    if corrected and steps is not None:
        return decay / (1 - decay) - steps * left / (1 - left)
    return decay / (1 - decay) * (1 - left)


def iterations_needed(decay: float, tolerance: float) -> int:
    """The fewest steps after which the initial value weighs at most `tolerance`: d^T <= tolerance.

    About log(1 / tolerance) / (1 - decay): 688 for decay 0.99 and a tolerance of 1e-3.
    Raises ValueError for a decay outside [0, 1) and for a tolerance outside (0, 1].
    """
    _check(decay, None)
    if not 0 < tolerance <= 1:
        raise ValueError(f"tolerance must be above 0 and at most 1, not {tolerance}")
    if tolerance == 1 or decay == 0:
        return 0 if tolerance == 1 else 1
    steps = ceil(log(tolerance) / log(decay))
    while decay**steps > tolerance:  # the quotient of logarithms may round to either side
        steps += 1
    while decay ** (steps - 1) <= tolerance:
        steps -= 1
    return steps


def _check(decay: float, steps: int | None) -> None:
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1), not {decay}")
    if steps is not None and steps < 0:
        raise ValueError(f"steps must be at least 0, not {steps}")
