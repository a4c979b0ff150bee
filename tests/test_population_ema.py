"""Running averages in closed form (K5)."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles.population import ema_weights as by_definition

from normlab.norms import BatchNorm
from normlab.population import EmaBank, ema_age, ema_noise, ema_weights, iterations_needed


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("steps", [0, 1, 7])
def test_weights_are_those_of_the_recursion(decay, steps):
    average = np.eye(steps + 1)[0]  # how much of the initial value and of each batch is in it
    for t in range(1, steps + 1):
        average = decay * average + (1 - decay) * np.eye(steps + 1)[t]
    np.testing.assert_allclose(ema_weights(decay, steps), average, rtol=1e-12, atol=0)
    np.testing.assert_allclose(ema_weights(decay, steps), by_definition(decay, steps), rtol=1e-12)
    assert sum(ema_weights(decay, steps)) == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_weights_are_those_of_a_layer_and_of_the_bank(decay):
    """P2: decay is the share that stays."""
    layer = BatchNorm(3, decay=0.9).double()
    bank = EmaBank(layer, [decay])
    x = torch.randn(6, 8, 3, dtype=torch.float64)
    for batch in x:
        layer(batch)
    means = np.vstack([np.zeros(3), x.mean(1).numpy()])
    variances = np.vstack([np.ones(3), x.var(1).numpy()])
    followed = bank.population(decay)[""]
    np.testing.assert_allclose(followed.mean, ema_weights(decay, 6) @ means, rtol=1e-10)
    np.testing.assert_allclose(followed.var, ema_weights(decay, 6) @ variances, rtol=1e-10)
    np.testing.assert_allclose(layer.running_mean, ema_weights(0.9, 6) @ means, rtol=1e-10)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("steps", [1, 2, 30])
def test_noise_and_age_are_sums_over_the_weights(decay, steps):
    initial, *batches = ema_weights(decay, steps)
    assert ema_noise(decay, steps) == pytest.approx(sum(w * w for w in batches), rel=1e-12)
    ages = range(steps - 1, -1, -1)
    age = initial * steps + sum(w * a for w, a in zip(batches, ages, strict=True))
    assert ema_age(decay, steps) == pytest.approx(age, rel=1e-12)
    of_batches = np.array(batches) / (1 - initial)
    assert ema_age(decay, steps, corrected=True) == pytest.approx(of_batches @ ages, rel=1e-9)
    assert ema_age(decay, corrected=True) == ema_age(decay)
    assert ema_noise(decay) == pytest.approx(ema_noise(decay, 10_000), rel=1e-12)
    assert ema_age(decay) == pytest.approx(ema_age(decay, 10_000), rel=1e-12)


def test_noise_of_independent_batches():
    """Variance (1 - d) / (1 + d) of one batch's, measured; no bias but what the start left."""
    rng = np.random.default_rng(0)
    weights = np.array(ema_weights(0.9, 100))
    batches = 2 + 3 * rng.standard_normal((100_000, 100))
    average = weights[0] * 7 + batches @ weights[1:]
    assert average.var() == pytest.approx(9 * ema_noise(0.9), rel=0.02)
    assert average.mean() == pytest.approx(2 + weights[0] * (7 - 2), abs=0.01)


def test_a_moving_mean_is_ahead_by_its_age():
    mean = 0.25 * np.arange(201)  # the initial value is right at step 0
    assert mean[-1] - ema_weights(0.9, 200) @ mean == pytest.approx(0.25 * ema_age(0.9, 200))


def test_iterations_needed_by_the_talk_s_decay():
    """0.99^T forgets its start to one part in 23,000 after 1000 steps, 0.9^T after 100."""
    assert iterations_needed(0.99, 4.4e-5) == 999
    assert iterations_needed(0.9, 1e-3) == 66
    assert iterations_needed(0.99, 1e-3) == 688
    assert iterations_needed(0.5, 0.125) == 3
    assert iterations_needed(0.5, 0.1249) == 4
    assert iterations_needed(0.0, 1e-9) == 1
    assert iterations_needed(0.9, 1) == 0


@given(decay=st.floats(0, 0.9999), tolerance=st.floats(1e-12, 1))
def test_iterations_needed_is_the_first_that_is_enough(decay, tolerance):
    steps = iterations_needed(decay, tolerance)
    assert decay**steps <= tolerance
    assert steps == 0 or decay ** (steps - 1) > tolerance


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ema_weights(1.0, 3), "decay must be in"),
        (lambda: ema_noise(-0.1), "decay must be in"),
        (lambda: ema_age(float("nan")), "decay must be in"),
        (lambda: ema_weights(0.9, -1), "steps must be at least 0"),
        (lambda: ema_age(0.9, 0, corrected=True), "at least 1 for a corrected average"),
        (lambda: iterations_needed(0.9, 0), "tolerance must be above 0"),
        (lambda: iterations_needed(0.9, 1.5), "tolerance must be above 0"),
    ],
)
def test_impossible_averages_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
