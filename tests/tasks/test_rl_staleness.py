"""Walkers, their teacher, and what staleness is measured by (5 s)."""

import pytest
import torch
from torch import nn

from normlab import population
from normlab.norms.bn import BatchNorm
from normlab.tasks import rl_staleness

TINY = ["task.rounds=3", "task.walkers=8", "task.steps=2", "task.width=4", "task.every=2"]


def test_walkers_go_where_they_are_told(monkeypatch):
    monkeypatch.setattr(rl_staleness, "NOISE", 0.0)
    monkeypatch.setattr(rl_staleness, "RESTART", 0.0)
    world = rl_staleness.Walkers(3, 10.0, torch.Generator().manual_seed(0))
    world.state = torch.tensor([[0.0, 1.0], [9.9, 0.0], [-20.0, 0.0]])
    reached, reward = world.step(torch.tensor([2, 1, 0]))
    expected = torch.tensor([[1.0, 1.0], [9.9, 0.0], [-20.3, -0.3]])
    assert torch.allclose(reached, expected)
    assert torch.allclose(reward, torch.tensor([-0.9, -0.01, -1.0]), atol=1e-6)
    assert torch.equal(world.state, reached)


def test_some_start_anew_after_what_they_reached(monkeypatch):
    monkeypatch.setattr(rl_staleness, "RESTART", 1.0)
    world = rl_staleness.Walkers(4, 10.0, torch.Generator().manual_seed(0))
    world.state = torch.full((4, 2), 50.0)
    reached, _ = world.step(torch.ones(4, dtype=torch.long))
    assert (reached[:, 0] > 50).all()
    assert (world.state.abs() < 5).all()


@pytest.mark.parametrize(("batches", "decay"), [(1, 0.9), (30, 0.9), (200, 0.5)])
def test_the_lag_is_the_recursions(batches, decay):
    mean = 0.0
    for number in range(1, batches + 1):
        mean = decay * mean + (1 - decay) * 0.5 * number
    found = rl_staleness.lagging(1, batches, 0.5, decay)
    assert found["lag"] == pytest.approx(0.5 * batches - mean, abs=1e-9)
    assert found["lag_closed"] == pytest.approx(0.5 * batches - mean, abs=1e-9)


def test_staleness_of_one_norm_is_its_shift():
    """Of a network that is one batch norm, values by other means are shifted by these."""
    network = BatchNorm(3, affine=False)
    states = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    own = rl_staleness.estimated(network, states)
    assert rl_staleness.stale(network, own, states) == (pytest.approx(0, abs=1e-4), 0)
    moved = {"": population.Statistics(own[""].mean + own[""].var.sqrt(), own[""].var, 0)}
    gap, flips = rl_staleness.stale(network, moved, states)
    assert gap == pytest.approx(1.0, abs=1e-2)  # all values one standard deviation lower
    assert flips == 0
    away = own[""].mean - torch.tensor([0.0, 0.0, 9.0]) * own[""].var.sqrt()
    _, flips = rl_staleness.stale(
        network, {"": population.Statistics(away, own[""].var, 0)}, states
    )
    own_choice = ((states - own[""].mean) / own[""].var.sqrt()).argmax(1)
    assert flips == pytest.approx(100 * float((own_choice != 2).double().mean()))


def test_learning_lowers_the_loss_on_what_was_seen():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 8), BatchNorm(8), nn.ReLU(), nn.Linear(8, 3))
    state, action = torch.randn(64, 2), torch.randint(3, (64,))
    target = state.sum(1)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)

    def off():
        chosen = network(state).gather(1, action[:, None])[:, 0]
        return float((chosen - target).detach().square().mean())

    before, draw = off(), torch.Generator().manual_seed(0)
    for _ in range(20):
        rl_staleness._learn(network, optimizer, state, action, target, draw)
    assert off() < before / 4


def test_who_acts_is_who_is_asked_for(measure):
    found = {who: measure("rl_staleness", *TINY, f"task.inference={who}")
             for who in ("ema", "precise", "target")}  # fmt: skip
    assert found["ema"]["gap"] == found["ema"]["gap_ema"]
    assert found["precise"]["gap"] == found["precise"]["gap_precise"]
    assert found["target"]["gap"] not in (
        found["target"]["gap_ema"],
        found["target"]["gap_precise"],
    )


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("task.rounds=0", "task.rounds=0: it is at least 1"),
        ("task.goal=0.0", "task.goal=0.0, task.rate=0.01: both must be above 0"),
        ("task.walkers=1", "a round needs 8 states"),
        ("task.inference=best", "task.inference='best': task=rl_staleness wants one of ema, "),
        ("norm=ln", "this norm has none"),
    ],
)
def test_refusals(measure, override, says):
    with pytest.raises(ValueError, match=says) as refused:
        measure("rl_staleness", *TINY, override)
    assert "\n" not in str(refused.value)
