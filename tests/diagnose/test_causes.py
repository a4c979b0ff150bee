"""Each cause is found where it was put, and called by its name; a healthy network has none."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from diagnose.networks import CLASSES, Batch, Net, Trained, averaged, batched, norms, signals
from normlab.diagnose import Diagnosis, diagnose

CAUSES = {
    "never_updated", "momentum_too_small", "momentum_reversed", "eps_mismatch", "biased_variance",
    "not_a_variance", "common_factor", "other_domain", "averaged_weights", "stale_statistics",
}  # fmt: skip


def found(model: nn.Module, batches: list[Batch], **options: object) -> Diagnosis:
    return diagnose(model, batches, progress=False, **options)  # type: ignore[arg-type]


def causes(diagnosis: Diagnosis) -> list[str]:
    return [f.name for f in diagnosis.findings if f.name in CAUSES]


def change(trained: Trained, to: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> nn.Module:
    """A copy whose precise statistics are changed so."""
    model = averaged(trained.copy(), trained.batches, None)
    for norm in norms(model).values():
        mean, var = to(norm.running_mean.clone(), norm.running_var.clone())
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)
    return model


def test_a_healthy_network_is_healthy(trained: Trained) -> None:
    diagnosis = found(trained.net, trained.batches)
    assert diagnosis.healthy
    assert causes(diagnosis) == []
    assert diagnosis.verdict == "healthy"


def test_an_average_of_batches_with_fixed_weights_is_healthy(trained: Trained) -> None:
    for momentum in (None, 0.1):
        assert found(averaged(trained.copy(), trained.batches, momentum), trained.batches).healthy


def test_statistics_of_earlier_weights_are_stale(trained: Trained) -> None:
    model = trained.copy()
    running = {n: v for n, v in trained.early.items() if "running" in n}
    model.load_state_dict(running, strict=False)
    diagnosis = found(model, trained.batches)
    assert causes(diagnosis) == ["stale_statistics"]
    assert not diagnosis.healthy
    finding = diagnosis.findings[0]
    losses = diagnosis.scores["train", "stored"], diagnosis.scores["train", "precise"]
    assert finding.evidence["loss with stored statistics"] == losses[0]["loss"]
    assert losses[0]["loss"] > losses[1]["loss"]
    assert finding.layers[0] != "bn1"


@pytest.mark.parametrize("left", [0.05, 0.3, 0.9])
def test_what_is_left_of_the_initial_values_is_told(trained: Trained, left: float) -> None:
    model = change(trained, lambda m, v: ((1 - left) * m, left + (1 - left) * v))
    diagnosis = found(model, trained.batches)
    assert causes(diagnosis) == ["momentum_too_small"]
    assert diagnosis.findings[0].evidence["initial weight"] == pytest.approx(left, rel=0.1)


def test_little_of_the_initial_values_is_nothing(trained: Trained) -> None:
    assert found(
        change(trained, lambda m, v: (0.999 * m, 0.001 + 0.999 * v)), trained.batches
    ).healthy


@pytest.mark.parametrize("momentum", [0.9, 0.99])
def test_a_memory_of_one_batch(trained: Trained, momentum: float) -> None:
    diagnosis = found(averaged(trained.copy(), trained.batches, momentum), trained.batches)
    assert causes(diagnosis) == ["momentum_reversed"]
    assert not diagnosis.healthy


def test_a_factor_on_everything(trained: Trained) -> None:
    model = change(trained, lambda m, v: (7 * m, 7 * v))
    diagnosis = found(model, trained.batches)
    assert causes(diagnosis) == ["common_factor"]
    assert diagnosis.findings[0].evidence["factor"] == pytest.approx(7, rel=0.05)


@pytest.mark.parametrize("power", [0.5, -1.0, -0.5, 2.0])
def test_a_power_of_the_variance(trained: Trained, power: float) -> None:
    diagnosis = found(change(trained, lambda m, v: (m, v**power)), trained.batches)
    assert causes(diagnosis) == ["not_a_variance"]
    assert diagnosis.findings[0].evidence["power"] == power


def test_a_biased_variance_at_an_nbs_of_two(trained: Trained) -> None:
    """Half of the precise one where a pair has two elements that no norm before has tied."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(24, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES))
    averaged(model, batched(trained.data, 2), None)
    assert causes(found(model, trained.batches, nbs=2)) == []
    model[2].running_var *= 1 / 2
    diagnosis = found(model, trained.batches, nbs=2)
    assert causes(diagnosis) == ["biased_variance"]
    finding = next(f for f in diagnosis.findings if f.name == "biased_variance")
    assert finding.layers == ["2"]
    assert finding.evidence["NBS"] == 2
    assert finding.evidence["ratio in layers with few elements"] == pytest.approx(0.5, rel=0.05)


def test_a_biased_variance_behind_a_norm_is_the_precise_one(trained: Trained) -> None:
    """A norm of the same pairs leaves them the same but for the sign: (x - -x)^2 / 4 = x^2."""
    model = averaged(trained.copy(), batched(trained.data, 2), None)
    assert causes(found(model, trained.batches, nbs=2)) == []
    positions = {"bn1": 20, "bn2": 9, "bn3": 7, "bn4": 1}
    for name, norm in norms(model).items():
        norm.running_var *= (2 * positions[name] - 1) / (2 * positions[name])
    assert found(model, trained.batches, nbs=2).healthy


def test_statistics_made_with_another_eps(trained: Trained) -> None:
    model = trained.copy()
    for name in ("conv1", "conv2", "conv3", "fc"):
        model.get_submodule(name).weight.data *= 0.03  # variances about as small as the eps
    for norm in norms(model).values():
        norm.eps = 1e-3
    averaged(model, trained.batches, None)
    assert "eps_mismatch" not in causes(found(model, trained.batches))
    for norm in norms(model).values():
        norm.eps = 1e-5
    diagnosis = found(model, trained.batches)
    assert causes(diagnosis) == ["eps_mismatch"]
    finding = next(f for f in diagnosis.findings if f.name == "eps_mismatch")
    assert finding.evidence["eps that fits"] == 1e-3


@pytest.mark.parametrize("to", [lambda x: x + 1, lambda x: 0.3 * x], ids=["brighter", "fog"])
def test_statistics_of_other_inputs(trained: Trained, to: Callable[[Tensor], Tensor]) -> None:
    other = [(to(x), y) for x, y in trained.batches]
    diagnosis = found(averaged(trained.copy(), other, None), trained.batches)
    assert causes(diagnosis) == ["other_domain"]
    assert diagnosis.findings[0].layers[0] == "bn1"


def test_statistics_of_the_target(trained: Trained) -> None:
    """Where the target is given, they need not stand out at the first layer."""
    target = [(x.flip(2) * 0.6 + 0.5, y) for x, y in trained.batches]
    model = averaged(trained.copy(), target, None)
    diagnosis = found(model, trained.batches, target=target)
    assert causes(diagnosis) == ["other_domain"]
    assert "of the target" in diagnosis.findings[0].sentence


def test_averaged_weights_with_copied_statistics(trained: Trained) -> None:
    last, early = trained.net.state_dict(), trained.early
    mean = {n: (v + early[n]) / 2 if "weight" in n or "bias" in n else v for n, v in last.items()}
    model = Net().eval()
    model.load_state_dict(mean)
    assert causes(found(model, trained.batches, states=[last, early])) == ["averaged_weights"]
    assert "averaged_weights" not in causes(found(model, trained.batches, states=[early]))


@torch.no_grad()
def test_norms_that_were_folded_and_are_still_applied(trained: Trained) -> None:
    model = averaged(trained.copy(), trained.batches, None)
    for layer, norm in (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"), ("fc", "bn4")):
        before, bn = model.get_submodule(layer), norms(model)[norm]
        factor = bn.weight / (bn.running_var + bn.eps).sqrt()
        before.weight.mul_(factor.view(-1, *[1] * (before.weight.dim() - 1)))
        before.bias = nn.Parameter(bn.bias - factor * bn.running_mean)
    diagnosis = found(model, trained.batches)
    assert [f.name for f in diagnosis.findings if f.severity == "problem"] == ["fused_layers"]


def test_without_labels_far_statistics_are_a_problem(trained: Trained) -> None:
    images = [x for x, _ in trained.batches]
    assert diagnose(trained.net, images, progress=False).healthy
    model = change(trained, lambda m, v: (m + v.sqrt(), v))
    diagnosis = diagnose(model, images, progress=False)
    assert not diagnosis.healthy
    assert "no labels" in diagnosis.findings[0].sentence


def test_a_layer_that_is_alone_is_compared() -> None:
    x, y = signals(256, 3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(24, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES))
    averaged(model, batched((x, y), 32), None)
    assert found(model, batched((x, y), 32)).healthy
    model[2].running_mean += 5
    assert not found(model, batched((x, y), 32)).healthy
