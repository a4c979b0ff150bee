"""`recalibrate`: a model's population statistics estimated anew, and what that changes."""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from normlab import dist
from normlab.norms.base import PopulationNorm, SampleNorm, population_layers
from normlab.population import Population, apply, estimate
from normlab.recalibrate.options import Method, Unknown
from normlab.subject.batches import Batches, samples_of
from normlab.subject.scoring import Score, Scoring, measure
from normlab.surgery import convert

__all__ = ["Recalibration", "check_batches", "recalibrate"]


@dataclass(frozen=True)
class Recalibration:
    """What `recalibrate` did.

    population: the estimates, float64, by the layers' names.
    state: the same as the model's buffers now hold it, by the names of its state_dict.
    untouched: batch norms that keep the statistics they had, and why.
    samples, batch: how many samples were seen, of all ranks, and at most in one batch.
    before, after: loss and error with the statistics as they were, and with the new ones, on the
        batches of the estimate (`same_data`) or on others.
    """

    population: Population
    state: dict[str, Tensor] = field(repr=False)
    untouched: dict[str, str]
    estimator: Method
    nbs: int | None
    samples: int
    batch: int
    before: Score
    after: Score
    same_data: bool

    def __str__(self) -> str:
        norms = f"{len(self.population)} batch norm{'s' * (len(self.population) > 1)}"
        layerwise = self.estimator == "layerwise"
        batch = "layer by layer" if layerwise else f"{self.estimator}, in batches of {self.batch}"
        groups = f", NBS {self.nbs}" if self.nbs else ""
        lines = [f"{norms}: statistics of {self.samples:,} samples, {batch}{groups}"]
        if self.untouched:
            name, why = next(iter(self.untouched.items()))
            more = len(self.untouched) - 1
            lines.append(f"left as they were: {name} ({why})" + f" and {more} more" * bool(more))
        if self.before.loss is None and self.before.error is None:
            return "\n".join([*lines, "loss and error are not known: the data has no labels"])
        lines.append(f"{'':20}{'error %':>9}{'loss':>11}")
        for name, score in (("stored statistics", self.before), ("estimated anew", self.after)):
            lines.append(f"{name:20}{_number(score.error, 9, 2)}{_number(score.loss, 11, 4)}")
        what = "the data of the estimate itself" if self.same_data else "test data"
        return "\n".join([*lines, f"on {self.before.n:,} samples of {what}"])


def _number(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    estimator: Method = "pooled",
    nbs: int | None = None,
    test: Iterable[Any] | None = None,
    scoring: Scoring | None = None,
    unknown: Unknown = "refuse",
    progress: bool = True,
) -> Recalibration:
    """Estimate the population statistics of `model`'s batch norms on `batches`, and put them in.

        report = recalibrate(model, loader, test=test_loader)
        print(report)

    Changed, in place, are the running means and variances, and nothing else: no parameter, no mode,
    and not `num_batches_tracked`, which tells how long the model was trained. Batch norms are
    torch's (SyncBatchNorm too), timm's with an activation, and normlab's own. Frozen ones (of
    torchvision, timm or normlab), and those without running statistics, stay as they are. Batches
    of another domain than the training data make this Adaptive BN.

    Where there is a process group, all ranks call this with the same model and batches of their
    own, and get what one process with all the batches would.

    Args:
        model: any module, on any device; in train() or eval().
        batches: a list or a loader, which gives the same batches in every pass. Of `Batches` with a
            shorter last one, that is left out (not so in "layerwise", where it does no harm).
        estimator: "pooled", "mean" or "layerwise", see `normlab.population.estimate`.
        nbs: consecutive samples that share one set of statistics; None: the whole batch.
        test: batches to measure loss and error on, before and after; None: `batches` themselves.
        scoring: how to run the model, and what its outputs are worth; see `Scoring`.
        unknown: what happens to layers of other classes with running statistics (timm's EvoNorm):
            "refuse", by name, or "keep" what they have.
        progress: show bars on a terminal.

    Raises ValueError, with the model as it was: for a model without a batch norm or with frozen
    ones alone, for data of fewer samples than a batch, for batches that can be passed over only
    once, for estimates that are not finite, and as `normlab.convert` and `estimate` do.
    """
    if estimator not in get_args(Method):
        raise ValueError(f"estimator is one of {', '.join(get_args(Method))}, not {estimator!r}")
    for given in (batches, test):
        if given is not None and iter(given) is given:
            raise ValueError("batches are passed over several times: give a list or a loader")
    converted = _converted(model, unknown)
    if isinstance(batches, Batches):
        check_batches(batches, nbs)
        batches = batches if estimator == "layerwise" else batches.whole()
    scoring = scoring or Scoring()
    shown = batches if test is None else test
    before = measure(model, shown, scoring, progress=progress, label="as stored")
    seen = _Seen(batches, quiet=not progress or estimator == "layerwise")
    population = estimate(
        converted, seen, estimator=estimator, group_size=nbs, forward=scoring.forward
    )
    _refuse_infinite(population)
    apply(converted, population)
    state = _statistics(converted)
    held = model.state_dict()
    with torch.no_grad():
        for name, value in state.items():
            held[name].copy_(value)
    samples, batch = seen.of_ranks(dist.home(model))
    return Recalibration(
        population=population,
        state={name: held[name].detach().clone() for name in state},
        untouched=_untouched(model, converted, population),
        estimator=estimator,
        nbs=nbs,
        samples=samples,
        batch=batch,
        before=before,
        after=measure(model, shown, scoring, progress=progress, label="estimated"),
        same_data=test is None,
    )


def check_batches(batches: Batches, nbs: int | None) -> None:
    """Raises ValueError in one line for batches that no statistics can be estimated on."""
    size, samples = batches.batch_size, batches.samples
    if size is not None and nbs is not None and size % nbs:
        raise ValueError(f"batches of {size} samples are not a multiple of nbs={nbs}")
    if size is not None and samples is not None and samples < size:
        raise ValueError(
            f"{batches.name} offers {samples} samples, fewer than a batch of {size}: take smaller "
            "batches, or more samples"
        )


class _Seen:
    """Batches that are counted as they go by; of several passes, one."""

    def __init__(self, batches: Iterable[Any], *, quiet: bool) -> None:
        self._batches = batches
        self._quiet = True if quiet or dist.place()[0] else None
        self._samples, self._largest = 0, 0

    def __iter__(self) -> Iterator[Any]:
        samples = 0
        for batch in tqdm(
            self._batches, desc="statistics", unit="batch", leave=False, disable=self._quiet
        ):
            n = samples_of(batch)
            samples, self._largest = samples + n, max(self._largest, n)
            self._samples = max(self._samples, samples)
            yield batch

    def of_ranks(self, device: torch.device) -> tuple[int, int]:
        """Samples of all ranks, and of the largest batch."""
        own = torch.tensor([self._samples, self._largest], dtype=torch.int64, device=device)
        of_ranks = dist.stack(own)
        return int(of_ranks[:, 0].sum()), int(of_ranks[:, 1].max())


# -- which layers ---------------------------------------------------------------------------------


def _converted(model: nn.Module, unknown: Unknown) -> nn.Module:
    """A copy of `model` in which all batch norms that have statistics to estimate are normlab's."""
    if unknown not in get_args(Unknown):
        raise ValueError(f"unknown is 'refuse' or 'keep', not {unknown!r}")
    result = copy.deepcopy(model)
    if any(_convertible(module) for module in result.modules()):
        # The decay plays no role here; any will do where torch's momentum is 0 or None.
        result = convert(
            result, "bn", only=lambda _, module: _convertible(module), unknown=unknown, decay=0.9
        )
    for module in result.modules():
        if isinstance(module, _BatchNorm):
            # What was kept: `estimate` takes it for forgotten unless it tracks nothing, which in
            # eval() is all the same to it.
            module.track_running_stats = False
    layers = population_layers(result)
    if all(layer.frozen for layer in layers.values()):
        frozen = [name for name, module in model.named_modules() if _is_frozen(module)]
        frozen += [name for name, layer in layers.items() if layer.frozen]
        why = f"all {len(frozen)} are frozen" if frozen else "there is none"
        raise ValueError(
            f"{type(model).__name__} has no batch norm whose statistics could be estimated: {why}"
        )
    return result


def _convertible(module: nn.Module) -> bool:
    """Whether a module of another library has running statistics that may move."""
    if isinstance(module, (PopulationNorm, SampleNorm)) or _is_frozen(module):
        return False
    if isinstance(module, _BatchNorm):
        return isinstance(module.running_mean, Tensor)
    instance = isinstance(module, nn.modules.instancenorm._InstanceNorm)
    return not instance and bool({"running_mean", "running_var"} & set(module._buffers))


def _is_frozen(module: nn.Module) -> bool:
    """torchvision's, timm's or detectron2's batch norm that is made of constants: by name, since
    these packages need not be there."""
    return type(module).__name__ in ("FrozenBatchNorm2d", "FrozenBatchNormAct2d")


def _untouched(model: nn.Module, converted: nn.Module, population: Population) -> dict[str, str]:
    """The batch norms of `model` that have no estimate, and why."""
    found = {}
    layers = population_layers(converted)
    for name, module in model.named_modules():
        if name in layers:
            if layers[name].frozen:
                found[name] = "frozen"
            elif not any(name + key in population for key in layers[name].populations()):
                found[name] = "no batch reached it"
        elif _is_frozen(module):
            found[name] = "frozen"
        elif _convertible(module):
            found[name] = f"a {type(module).__name__}"
        elif isinstance(module, _BatchNorm):
            found[name] = "it has no running statistics"
    return found


def _statistics(model: nn.Module) -> dict[str, Tensor]:
    """The statistics that the batch norms of `model` hold, under all their names."""
    saved = model.state_dict()
    named = model.named_modules(remove_duplicate=False)
    layers = {name: m for name, m in named if isinstance(m, PopulationNorm) and not m.frozen}
    names = [
        f"{name}.{buffer}" if name else buffer
        for name, layer in layers.items()
        for buffer, value in layer.named_buffers(recurse=False)
        if value.is_floating_point()
    ]
    return {name: saved[name] for name in names if name in saved}


def _refuse_infinite(population: Population) -> None:
    for name, found in population.items():
        if not (found.mean.isfinite().all() and found.var.isfinite().all()):
            raise ValueError(
                f"the statistics of '{name}' are not finite on this data: weights or inputs are "
                "not, or overflow"
            )
