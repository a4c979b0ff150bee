"""Each fault of a training is what it says: against sums in float64, and plain trainings."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normlab.trial import trainings
from normlab.trial.material import Labelled
from normlab.trial.networks import norms
from normlab.trial.training import Trained, careful, set_momentum, train

Watched = list[tuple[nn.Module, list[Labelled]]]


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    """Each further training: the model, and the batches that it took."""
    seen: Watched = []

    def spy(
        model: nn.Module, optimizer: Any, batches: Iterator[Labelled], *args: Any, **kwargs: Any
    ) -> None:
        took: list[Labelled] = []
        seen.append((model, took))

        def noted() -> Iterator[Labelled]:
            for batch in batches:
                took.append(batch)
                yield batch

        train(model, optimizer, noted(), *args, **kwargs)

    monkeypatch.setattr(trainings, "train", spy)
    return seen


@pytest.fixture
def resting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Further training does not move the weights, so that all statistics are sums over batches."""
    monkeypatch.setattr(trainings, "LR", 0.0)


def stem(tiny: Trained, x: Tensor) -> Tensor:
    """(N, 8, 8, 8) float64: the input of the first norm."""
    return nn.functional.conv2d(x.double(), tiny.state["stem.weight"].double(), padding=1)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_weights_are_an_average_and_buffers_the_last_ones(
    tiny: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    points: list[dict[str, Tensor]] = []

    def spy(model: nn.Module, *args: Any, **kwargs: Any) -> None:
        train(model, *args, **kwargs)
        points.append({key: value.clone() for key, value in model.state_dict().items()})

    monkeypatch.setattr(trainings, "train", spy)
    state = trainings.averaged_weights(tiny).model.state_dict()
    assert len(points) == 3
    for key, value in state.items():
        if "running" in key or "num_batches" in key:
            assert torch.equal(value, points[-1][key])
        else:
            close(value, torch.stack([point[key].double() for point in points]).mean(0))


def test_recomputation_updates_twice_and_learns_the_same(tiny: Trained) -> None:
    case = trainings.recomputed(tiny)
    steps = 2 * tiny.size.further
    counts = {name: int(n.num_batches_tracked) for name, n in norms(case.model).items()}  # type: ignore[arg-type]
    assert counts == {"norm": steps, "block.1": 2 * steps, "block.4": 2 * steps}
    plain = tiny.network.build(tiny.material.classes, tiny.seed)
    set_momentum(plain, 0.1)
    train(plain, careful(plain, 2 * trainings.LR), tiny.stream(), steps)
    for (name, p), q in zip(case.model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=name)
    found, once = (m.get_buffer("block.1.running_mean") for m in (case.model, plain))
    assert not torch.allclose(found, once, atol=1e-4)
    assert "forward" not in case.model.get_submodule("block").__dict__


def test_a_frozen_backbone_keeps_its_weights_and_not_its_statistics(tiny: Trained) -> None:
    case, before = trainings.frozen_backbone(tiny), tiny.model()
    for (name, p), q in zip(case.model.named_parameters(), before.parameters(), strict=True):
        learnt = name.startswith("head")
        assert p.requires_grad is learnt
        assert torch.equal(p, q) is not learnt
    expected = tiny.state["norm.running_mean"].double()
    for x, _ in islice(tiny.stream(tiny.material.fogged), tiny.size.further):
        expected = 0.9 * expected + 0.1 * stem(tiny, x).mean((0, 2, 3))
    close(case.model.get_buffer("norm.running_mean"), expected)


@pytest.mark.usefixtures("resting")
def test_biased_variances_are_of_pairs(tiny: Trained) -> None:
    case = trainings.biased_variance(tiny)
    assert case.nbs == 2
    n = 2 * 8 * 8
    mean = tiny.state["norm.running_mean"].double()
    var = tiny.state["norm.running_var"].double() * (n - 1) / n
    for x, _ in islice(tiny.stream(size=16), 2 * tiny.size.further):
        pairs = stream_of_pairs(stem(tiny, x))
        mean = 0.9 * mean + 0.1 * pairs.mean((1, 3)).mean(0)
        var = 0.9 * var + 0.1 * pairs.var((1, 3), correction=0).mean(0)
    close(case.model.get_buffer("norm.running_mean"), mean)
    close(case.model.get_buffer("norm.running_var"), var)
    assert {type(layer) for layer in norms(case.model).values()} == {nn.BatchNorm2d}


def stream_of_pairs(y: Tensor) -> Tensor:
    """(2 k, C, H, W) to (k, 2, C, H W)."""
    return y.view(-1, 2, y.shape[1], y.shape[2] * y.shape[3])


@pytest.mark.usefixtures("resting")
def test_each_rank_has_the_statistics_of_its_shard(tiny: Trained) -> None:
    case = trainings.ranks_apart(tiny)
    x, y = tiny.material.train
    for state, part in zip(case.states, (y < 2, y >= 2), strict=True):
        expected = tiny.state["norm.running_var"].double()
        for batch, _ in islice(tiny.stream((x[part], y[part]), 8), tiny.size.further):
            expected = 0.9 * expected + 0.1 * stem(tiny, batch).var((0, 2, 3))
        close(state["norm.running_var"], expected)
        assert state["norm.num_batches_tracked"] == tiny.size.steps + tiny.size.further
        assert torch.equal(state["stem.weight"], case.states[0]["stem.weight"])
    loaded = case.model.state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in case.states[0].items())


def test_ranks_learn_from_both_shards(tiny: Trained, watched: Watched) -> None:
    trainings.ranks_apart(tiny)
    ((_, took),) = watched
    assert len(took) == 2 * tiny.size.further
    assert all((y < 2).all() for _, y in took[::2])
    assert all((y >= 2).all() for _, y in took[1::2])


@pytest.mark.usefixtures("resting")
def test_with_its_own_eps_the_statistics_would_fit(tiny: Trained) -> None:
    case = trainings.eps_lost(tiny)
    layers = norms(case.model).values()
    assert {layer.eps for layer in layers} == {1e-5}
    deep = case.model.get_submodule("block.4")
    inputs: list[Tensor] = []
    deep.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))

    def off() -> float:
        """How far the last norm's stored variance is from that of what it is given."""
        inputs.clear()
        with torch.no_grad():
            case.model.eval()(tiny.material.train[0])
        ratio = inputs[0].var((0, 2, 3)) / deep.get_buffer("running_var")
        return float(ratio.log().abs().median())

    lost = off()
    for layer in layers:
        layer.eps = 1e-3
    assert off() < 0.05 < 0.5 * lost


def test_one_group_decays_everything(tiny: Trained) -> None:
    case = trainings.decayed_norms(tiny)
    assert case.optimizer is not None
    (group,) = case.optimizer["param_groups"]  # type: ignore[misc]
    assert group["weight_decay"] > 0
    assert len(group["params"]) == len(list(case.model.parameters()))
    careful_groups: Any = tiny.optimizer["param_groups"]
    decays = {g["weight_decay"]: len(g["params"]) for g in careful_groups}
    assert decays == {0.05: 4, 0.0: 7}


def test_two_domains_take_turns(tiny: Trained, watched: Watched) -> None:
    case = trainings.two_domains(tiny)
    ((_, took),) = watched
    images, fogged = tiny.material.train[0], tiny.material.fogged[0]

    def among(x: Tensor, those: Tensor) -> bool:
        return bool((x[:, None] == those[None]).flatten(2).all(2).any(1).all())

    for batches in (took, case.batches):
        assert all(among(x, images) for x, _ in batches[::2])
        assert all(among(x, fogged) for x, _ in batches[1::2])


def test_a_shared_norm_is_called_twice(tiny: Trained) -> None:
    model = trainings.shared_norms(tiny).model.eval()
    assert model.get_submodule("norm") is model.get_submodule("block.1")
    assert model.get_submodule("norm") is not model.get_submodule("block.4")
    calls: list[int] = []
    model.get_submodule("norm").register_forward_hook(lambda *_: calls.append(1))
    model(tiny.material.test[0])
    assert len(calls) == 2
    steps = tiny.size.steps + 2 * tiny.size.further
    assert model.get_buffer("norm.num_batches_tracked") == steps


@pytest.mark.parametrize(
    "inject",
    [trainings.recomputed, trainings.shared_norms, trainings.averaged_weights],
    ids=lambda inject: inject.__name__,
)
def test_a_fault_is_a_function_of_the_seed(tiny: Trained, inject: Callable[[Trained], Any]) -> None:
    one, two = (inject(tiny).model.state_dict() for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)
