"""Runs of tasks, as small as they can be."""

import pytest
import torch

from normlab import config, perform


@pytest.fixture(autouse=True)
def _threads(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)


@pytest.fixture(scope="session")
def measure():
    """Perform a task with these overrides at demo; quantity -> its last value."""

    def performed(task, *overrides):
        composed = config.compose(["scale=demo", "device=cpu", f"task={task}", *overrides])
        return {row.quantity: row.value for row in perform.construct(composed).perform()}

    return performed
