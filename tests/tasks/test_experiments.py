"""Every experiment that is a task: its cells run and measure what it names, and its facts hold."""

import math

import pytest

from normlab import config, experiment, perform

TINY = {
    "costs": ["task.width=4", "task.depth=2", "task.size=4", "task.samples=8", "task.rounds=1"],
    "rl_staleness": ["task.rounds=3", "task.walkers=8", "task.steps=2", "task.width=4"],
    "bn_properties": ["epochs=1", "data.subset=100", "batch_size=50", "task.width=2"],
    "gan_update": ["data.subset=200", "batch_size=50", "task.steps=2", "task.width=4"],
    "fusion": ["epochs=1", "data.subset=200", "batch_size=50", "task.images=20", "task.steps=2"],
    "conventions": ["epochs=1", "data.subset=200", "batch_size=50"],
}
"""What makes a run of a task a matter of a tenth of a second."""

NAMES = sorted(
    name for name in experiment.names()
    if any(protocol.task for protocol in experiment.load(name).protocols.values())
)  # fmt: skip


def task_of(loaded):
    (name,) = {protocol.specs[0].partition(".")[0] for protocol in loaded.protocols.values()}
    return name


def measured(overrides, task):
    composed = config.compose(["device=cpu", *overrides, *TINY[task]])
    return {row.quantity: row.value for row in perform.construct(composed).perform()}


@pytest.fixture(scope="module")
def numbers():
    """Experiment -> for each cell of demo with the first seed, where it stands and its numbers."""
    known = {}

    def of(name):
        if name not in known:
            loaded = experiment.load(name)
            seed = loaded.scale("demo").axes["seed"][0]
            cells = [cell for cell in loaded.cells("demo") if cell.axes["seed"] == seed]
            task = task_of(loaded)
            known[name] = [(cell.at, measured(cell.overrides, task)) for cell in cells]
        return known[name]

    return of


@pytest.mark.parametrize("name", NAMES)
def test_a_run_measures_what_the_experiment_names(name, numbers):
    loaded = experiment.load(name)
    for at, values in numbers(name):
        for key, protocol in loaded.protocols.items():
            quantity = protocol.specs[0].partition(".")[2]
            assert math.isfinite(values[quantity]), (at, key)


@pytest.mark.parametrize("name", NAMES)
def test_the_facts_hold_however_little_is_trained(name, numbers):
    loaded = experiment.load(name)
    quantities = {key: p.specs[0].partition(".")[2] for key, p in loaded.protocols.items()}
    assert loaded.facts
    for fact in loaded.facts.values():
        for contrast in fact.contrasts(loaded.scale("demo").places):
            total = 0.0
            for factor, column, cell in contrast.terms:
                (values,) = (v for at, v in numbers(name) if cell.items() <= at.items())
                total += factor * values[quantities[column]]
            assert abs(total) <= fact.tolerance, (fact.name, contrast.label)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "costs"])
def test_a_run_says_the_same_again(name, numbers):
    loaded = experiment.load(name)
    cell = loaded.cells("demo")[0]
    again = measured(cell.overrides, task_of(loaded))
    assert again == numbers(name)[0][1]


@pytest.mark.parametrize("name", NAMES)
def test_every_scale_composes_and_facts_speak_of_its_cells(name):
    loaded = experiment.load(name)
    assert set(loaded.scales) == {"demo", "desk", "gpu", "paper"}
    for scale, grid in loaded.scales.items():
        first = experiment.load(name).cells(scale)[0]
        assert config.is_task(config.compose(first.overrides))
        for fact in loaded.facts.values():
            assert fact.contrasts(grid.places)
