"""Every norm that can be chosen builds into a network, trains a step, and is told apart."""

from functools import cache

import pytest
from torch import nn

from normlab import build, config, norms

NEEDS = {"ghost": ["nbs=16"], "renorm": ["nbs=16"], "virtual": ["nbs=80", "micro_batch=32"]}


@cache
def network(name: str) -> tuple[dict, nn.Module, type[nn.Module]]:
    small = ["model=tiny", "data=digits", "batch_size=64", *NEEDS.get(name, [])]
    cfg = config.compose([f"norm={name}", *small])
    config.check(cfg)
    layer = norms.find(cfg["norm"].get("module") or cfg["norm"]["name"])
    return cfg, build.model(cfg, build.data(cfg)), layer


@pytest.mark.parametrize("name", config.options("norm"))
def test_every_option_builds_and_takes_a_step(name):
    """P59: no shipped config names a layer or an option that is not there."""
    cfg, model, layer = network(name)
    assert any(isinstance(module, layer) for module in model.modules())
    optimizer = build.optimizer(cfg, model)
    images, labels = next(
        iter(build.data(cfg).train_batches(batch_size=64, seed=0, epoch=0, device="cpu"))
    )
    nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()
    assert all(value.isfinite().all() for value in model.state_dict().values())


@pytest.mark.parametrize("decays", [True, False])
@pytest.mark.parametrize("name", config.options("norm"))
def test_weight_decay_reaches_a_norm_only_if_the_recipe_says_so(name, decays):
    """P17: by whose parameters they are, not by their names or dimensions."""
    cfg, model, layer = network(name)
    cfg = {**cfg, "recipe": {**cfg["recipe"], "decay_norm": decays, "weight_decay": 0.1}}
    own = {id(p) for m in model.modules() if isinstance(m, layer) for p in m.parameters()}
    for group in build.optimizer(cfg, model).param_groups:
        mine = own & {id(p) for p in group["params"]}
        assert mine == (own if (group["weight_decay"] > 0) == decays else set())
