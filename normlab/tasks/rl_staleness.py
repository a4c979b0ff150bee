"""Moment staleness: a network that acts at once, on data that its own learning moves.

Walkers on a line start near 0 and earn least far from a goal: with position p, speed v and an
action a of -1, 0 or 1, v' = 0.7 v + 0.3 a, p' = p + v' + noise, and the reward is -|p' - goal| /
goal, at least -1. What they do is the greedy choice of a network with batch norm that learns
Q(p, v, a) from what they have just done (Q-learning, batch statistics). As it learns, they go to
where nobody was before, and its weights change too: running statistics are of an earlier time. Who
acts, and who values the next state in the target of the learning, is one of

- ``ema``: the network with its running statistics;
- ``precise``: the network with the population statistics of the states of the last round;
- ``target``: a copy of the network, made every few rounds, with such statistics.

Beside it the closed form: where the mean of every batch is `drift` more than the last one's, the
running mean with decay d is drift d (1 - d^T) / (1 - d) behind after T batches, from the first on.

Sources: the talk "Devils in BatchNorm", on ELF OpenGo ("moment staleness") and on the target
network of DQN. Neither gives a number; the problem is made for this.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normlab import population
from normlab.norms.base import normalization, population_layers
from normlab.norms.bn import BatchNorm
from normlab.population import Population
from normlab.tasks.base import Row

KEYS: tuple[str, ...] = ("norm",)

Inference = Literal["ema", "precise", "target"]
Norm = Callable[[int], nn.Module]

DISCOUNT, EXPLORE, RESTART = 0.9, 0.1, 0.02
"""Of the next state's value; share of random actions; share of walkers that begin anew, a step."""

NOISE = 0.05
"""Of a step on the line."""

UPDATES = 4
"""Steps of learning in a round, each on a share of what was seen in it."""


class Walkers:
    """`count` walkers on the line, on one device."""

    def __init__(self, count: int, goal: float, draw: torch.Generator) -> None:
        self.goal, self.draw = goal, draw
        self.state = self._fresh(count)

    def _fresh(self, count: int) -> Tensor:
        return 0.5 * torch.randn(count, 2, generator=self.draw)

    def step(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """The states (N, 2) that actions 0, 1, 2 (N,) lead to, and the rewards (N,); afterwards,
        some walkers start anew."""
        place, speed = self.state.unbind(1)
        speed = 0.7 * speed + 0.3 * (action.to(speed) - 1)
        place = place + speed + NOISE * torch.randn(len(place), generator=self.draw)
        reached = torch.stack((place, speed), 1)
        reward = -((place - self.goal).abs() / self.goal).clamp_max(1.0)
        anew = torch.rand(len(place), 1, generator=self.draw) < RESTART
        self.state = torch.where(anew, self._fresh(len(place)), reached)
        return reached, reward


def run(
    *,
    seed: int,
    device: torch.device,
    norm: Norm,
    inference: Inference,
    rounds: int,
    walkers: int,
    steps: int,
    every: int,
    width: int,
    rate: float,
    goal: float,
) -> Iterator[Row]:
    """Yield a row of `reward` per round (the mean of it), and the rest after the last.

    Args:
        inference: who acts and values next states.
        rounds, walkers, steps: in each round so many walkers make so many steps; then it learns.
        every: rounds between two copies of the network (inference=target).
        width: of the two hidden layers, each followed by a norm.
        rate: of Adam.
        goal: where walkers want to be.

    `gap` is how far who acts is, on the states that it has just met, from what its weights say with
    the statistics of these states: root mean square over the spread of the latter, mean over all
    rounds but the first; `flips` the share of these states, in %, where it prefers another action.
    `gap_ema` and `flips_ema`, `gap_precise` and `flips_precise` are those of the network with its
    running statistics, and with those of the round before, whoever acts. `reward_late` is the mean
    over the last quarter of the rounds, `reward_all` over all.

    Raises ValueError for numbers below 1 (a goal or a rate not above 0), and for a norm that keeps
    no statistics.
    """
    counts = {
        "rounds": rounds, "walkers": walkers, "steps": steps, "every": every, "width": width,
    }  # fmt: skip
    for key, given in counts.items():
        if given < 1:
            raise ValueError(f"task.{key}={given}: it is at least 1")
    if not (goal > 0 and rate > 0):
        raise ValueError(f"task.goal={goal}, task.rate={rate}: both must be above 0")
    if walkers * steps < 2 * UPDATES:
        raise ValueError(
            f"task.walkers={walkers}, task.steps={steps}: a round needs {2 * UPDATES} states"
        )
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Linear(2, width), norm(width), nn.ReLU(),
        nn.Linear(width, width), norm(width), nn.ReLU(),
        nn.Linear(width, 3),
    ).to(device)  # fmt: skip
    if not population_layers(network):
        raise ValueError("task=rl_staleness is about running statistics; this norm has none")
    for quantity, value in lagging(seed).items():
        yield Row(0, quantity, value)
    draw = torch.Generator().manual_seed(seed)
    world = Walkers(walkers, goal, draw)
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    acting, stands = network, running(network)  # nobody has met a state yet
    rewards: list[float] = []
    found: dict[str, list[float]] = {}
    met = torch.empty(0, 2)
    for number in range(rounds):
        if number and inference == "ema":
            stands = running(network)
        elif number and inference == "precise":
            stands = estimated(network, met)
        elif number and (number - 1) % every == 0:
            acting = copy.deepcopy(network)
            stands = estimated(acting, met)
        others = {"ema": running(network), "precise": stands}
        if number:
            others["precise"] = estimated(network, met)
        seen = [_step(acting, stands, world, draw, device) for _ in range(steps)]
        state, action, reward, reached = (torch.cat(part) for part in zip(*seen, strict=True))
        met = state
        rewards.append(float(reward.mean()))
        yield Row(number + 1, "reward", rewards[-1])
        if number:
            _note(found, "", stale(acting, stands, state))
            for which, one in others.items():
                _note(found, f"_{which}", stale(network, one, state))
        with torch.no_grad():
            best = said(acting, stands, reached).max(1).values
        _learn(network, optimizer, state, action, reward + DISCOUNT * best, draw)
    for quantity, values in found.items():
        yield Row(rounds, quantity, sum(values) / len(values))
    late = rewards[-max(1, rounds // 4) :]
    yield Row(rounds, "reward_late", sum(late) / len(late))
    yield Row(rounds, "reward_all", sum(rewards) / len(rewards))


def _note(found: dict[str, list[float]], ending: str, values: tuple[float, float]) -> None:
    for quantity, value in zip(("gap", "flips"), values, strict=True):
        found.setdefault(quantity + ending, []).append(value)


def _step(
    network: nn.Module,
    stands: Population,
    world: Walkers,
    draw: torch.Generator,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One step of all walkers: states, actions, rewards and where they led, on the device."""
    state = world.state
    greedy = said(network, stands, state.to(device)).argmax(1).cpu()
    random = torch.randint(3, greedy.shape, generator=draw)
    explores = torch.rand(greedy.shape, generator=draw) < EXPLORE
    action = torch.where(explores, random, greedy)
    reached, reward = world.step(action)
    return state.to(device), action.to(device), reward.to(device), reached.to(device)


def _learn(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Tensor,
    action: Tensor,
    target: Tensor,
    draw: torch.Generator,
) -> None:
    """A few steps of Q-learning with batch statistics, on shares of a round."""
    network.train()
    order = torch.randperm(len(state), generator=draw).to(state.device)
    for part in order.chunk(UPDATES):
        chosen = network(state[part]).gather(1, action[part, None])[:, 0]
        optimizer.zero_grad()
        F.smooth_l1_loss(chosen, target[part]).backward()
        optimizer.step()


def running(network: nn.Module) -> Population:
    """The network's running statistics as they are now."""
    return {
        name: population.Statistics(layer.running_mean.clone(), layer.running_var.clone(), 0)
        for name, layer in population_layers(network).items()
    }


def estimated(network: nn.Module, states: Tensor) -> Population:
    """The population statistics of these states, as one batch."""
    return population.estimate(network, [states], estimator="pooled")


@torch.no_grad()
def said(network: nn.Module, stands: Population, states: Tensor) -> Tensor:
    """The network's values (N, 3) of the actions, with these statistics."""
    network.eval()
    with population.using(network, stands):
        values: Tensor = network(states)
    return values


@torch.no_grad()
def stale(network: nn.Module, stands: Population, states: Tensor) -> tuple[float, float]:
    """How far values with these statistics are from those with the states' own: root mean square
    over the latter's standard deviation; and the share of other choices, in %."""
    with normalization(network.eval(), statistics="batch", update=False):
        own = network(states)
    values = said(network, stands, states)
    gap = (values - own).square().mean().sqrt() / own.std().clamp_min(1e-6)
    flips = (values.argmax(1) != own.argmax(1)).double().mean()
    return float(gap), 100 * float(flips)


def lagging(
    seed: int, batches: int = 30, drift: float = 0.5, decay: float = 0.9
) -> dict[str, float]:
    """How far a running mean is behind batches whose means drift, and the closed form."""
    draw = torch.Generator().manual_seed(seed)
    layer = BatchNorm(1, decay=decay).double()
    for number in range(1, batches + 1):
        x = torch.randn(16, 1, generator=draw, dtype=torch.float64)
        layer(x - x.mean() + number * drift)
    return {
        "lag": batches * drift - float(layer.running_mean),
        "lag_closed": drift * decay * (1 - decay**batches) / (1 - decay),
    }
