"""Every experiment at every scale takes two steps on tiny data: no configuration rots unrun.

A cell runs as it is composed, evaluations and probes included, but for its size: 16 images of noise
a step in place of the data set, the batches it forms in proportion, one process, a shallow network.
One cell of each experiment at two of its scales runs always; all of them, at every scale, are slow.
"""

import copy
from dataclasses import replace
from itertools import islice
from math import lcm

import pytest
from compositions import composed

from normlab import agenda, build, config, environment, experiment, perform, worker
from normlab.checkpoint import Stop
from normlab.orders import Order
from normlab.protocols import Protocol
from normlab.runs import RunDir

BATCH = 16
"""Images a step, or more where a pattern needs them."""

LAYERS = {"torchvision_resnet": 18, "cifar_resnet": 8}
"""The depth of a network whose own is a matter of size."""

SIZES = {"torchvision_resnet": 64}
"""Pixels a side, for 32 where the images of the scale have more: with a channel a group, the last
feature maps must not be a pixel."""


def cells(name, scale):
    """Overrides of each cell, of the first seed alone."""
    made = experiment.load(name).cells(scale)
    first = made[0].axes.get("seed")
    return [tuple(cell.overrides) for cell in made if cell.axes.get("seed") == first]


SCALES = ["demo", "desk", "gpu", "paper"]
"""Those that train."""

GRIDS = [(name, scale) for name in experiment.names() for scale in SCALES]


class FirstTwo:
    """A data set of which training sees two batches of an epoch."""

    def __init__(self, data):
        self._data = data

    def __getattr__(self, name):
        return getattr(self._data, name)

    def train_batches(self, **how):
        return islice(self._data.train_batches(**how), 2)


def shrunk(full):
    """A composed config at the size of a test."""
    small = copy.deepcopy(full)
    order = Order.parse(small["order"])
    whole = lcm(order.group if order.patterned else 1, len(small["domains"]))
    batch = lcm(BATCH, whole)
    factor = max(1, small["batch_size"] // batch)
    small["batch_size"] = batch if factor > 1 else small["batch_size"]
    for key, least in (("nbs", 2), ("micro_batch", 1)):
        if small[key] is not None:
            # In proportion, but of whole patterns and equal parts of the domains.
            least = lcm(whole, least)
            most = max(least, small[key] // factor)
            small[key] = most if factor == 1 else divisor(small["batch_size"], least, most)
    small |= {"world_size": 1, "sync_group_size": None, "device": "cpu", "threads": 1}
    if small["sync_layers"] is not None:
        small["sync_layers"] = "*1"  # some, whatever the network is
    small |= {"epochs": 1, "eval_last": 1, "eval_at": [0] if 0 in small["eval_at"] else []}
    small["keep_after"] = None
    if small["freeze_after"] is not None:
        small |= {"epochs": 2, "freeze_after": 1}
    module = small["model"].get("module", small["model"]["name"])
    if module in LAYERS:
        small["model"]["depth"] = LAYERS[module]
    if small["model"].get("hidden"):
        small["model"]["hidden"] = 64
    side = min(SIZES.get(module, 32), small["data"].get("size", 8))
    channels = 1 if small["data"]["name"] == "digits" else 3
    images = 4 * max(small["batch_size"], small["nbs"] or 1)
    classes = max(4, order.labels) if order.patterned else 4
    small["data"] = {"name": "synthetic", "n": images, "classes": classes, "size": side,
                     "channels": channels}  # fmt: skip
    small["evals"] = list(dict.fromkeys(_within(spec, images) for spec in small["evals"]))
    return small


def divisor(number, least, most):
    """The largest one that is a multiple of `least` and at most `most`."""
    return max(n for n in range(least, most + 1, least) if number % n == 0)


def _within(spec, images):
    """An evaluation, of at most as many images as there are."""
    protocol = Protocol.parse(spec)
    tested = images // 8 if protocol.shift else images // 4  # half of them give statistics
    most = images if protocol.statistics.startswith("precise") else tested
    samples = min(protocol.samples, most) if protocol.samples else None
    batch = min(protocol.batch, samples or most) if protocol.batch else None
    return str(replace(protocol, samples=samples, batch=batch))


def run(name, scale, overrides, path):
    asked = experiment.load(name)
    full = composed(*overrides) | {"evals": asked.evals(scale), "probes": asked.probes(scale)}
    config.check(full)
    if config.is_task(full):
        task = perform.construct(shrunk(full))
        assert len([*islice(task.perform(), 2)]) > 0
        return
    small = shrunk(full)
    config.check(small)
    job = worker.construct(small)
    before = [p.detach().clone() for p in job.model.parameters()]
    directory = RunDir(path)
    path.mkdir()
    directory.write_env(environment.describe(job) | {"memory_kept": False})
    status = worker.work(replace(job, data=FirstTwo(job.data), steps=2), directory, Stop())
    assert (status["status"], status["step"]) == ("done", 2 * small["epochs"])
    assert agenda.missing(small, directory) == []
    after = zip(before, job.model.parameters(), strict=True)
    assert any(not old.equal(new) for old, new in after)
    assert build.plan(small).batch == build.plan(full).batch


IN_TURN = [GRIDS[i] for i in range(len(GRIDS)) if (i // 4 + i) % 2 == 0]
"""Of every experiment, two scales: demo and gpu, or desk and paper."""


@pytest.mark.parametrize(("name", "scale"), IN_TURN, ids=lambda value: value)
def test_a_cell_of_two_scales_takes_two_steps(name, scale, tmp_path):
    run(name, scale, cells(name, scale)[0], tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "scale"), GRIDS, ids=lambda value: value)
def test_every_cell_takes_two_steps(name, scale, tmp_path):
    for number, overrides in enumerate(cells(name, scale)):
        run(name, scale, overrides, tmp_path / str(number))


@pytest.mark.parametrize("name", experiment.names())
def test_an_experiment_has_its_four_scales(name):
    first, further = SCALES, list(experiment.load(name).scales)[len(SCALES) :]
    assert list(experiment.load(name).scales) == [*first, *further]
    assert set(further) <= {"pretrained"}
