"""`normlab recalibrate`: a checkpoint written anew with statistics that were estimated."""

from argparse import Namespace
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from normlab import agreement
from normlab.ranks import group
from normlab.recalibrate.averaging import average
from normlab.recalibrate.estimation import Recalibration, check_batches, recalibrate
from normlab.subject.arguments import from_arguments
from normlab.subject.checkpoint import Checkpoint

__all__ = ["main"]

PATIENCE = 1800.0
"""Seconds that a rank waits for the others."""


def main(given: Namespace) -> int:
    """Estimate, write, read back, and report; the exit code.

    Under torchrun each rank takes every world_size-th batch, and the first one writes.
    Everything that can be refused is refused before anything is estimated.
    """
    subject = from_arguments(_told(given))
    checkpoint = subject.checkpoint
    assert checkpoint is not None
    sources = [checkpoint, *subject.others]
    for source in sources:
        source.refuse_itself(given.out)
    checkpoint.check_out(given.out, overwrite=given.overwrite)
    check_batches(subject.train, given.nbs)
    weights = average(subject.model, sources) if given.average else dict(checkpoint.state)
    if given.average:
        subject.model.load_state_dict(weights, strict=False)  # its files fit
    rank, ranks = group.place()
    test = None if subject.test is None else subject.test.of_rank(rank, ranks)  # may have no len
    with group.joined(cuda=subject.device.type == "cuda", timeout=PATIENCE):
        try:
            report = recalibrate(
                subject.model, subject.train.of_rank(rank, ranks), estimator=given.estimator,
                nbs=given.nbs, test=test, scoring=subject.scoring, unknown=given.unknown,
            )  # fmt: skip
        except ValueError as error:  # the way out, as it is called here
            raise ValueError(str(error).replace("unknown='keep'", "--unknown keep")) from error
        new = _new(checkpoint, weights, report)
        agreement.by_first(partial(_write, checkpoint, new, given), subject.device)
        if rank == 0:
            print(report)
            print(_last_line(given, checkpoint))
    return 0


def _told(given: Namespace) -> Namespace:
    """What was given, in the words of a subject: `checkpoint`, and as `data` what to estimate on.

    Raises ValueError for options that do not belong together.
    """
    given = Namespace(**vars(given))
    if given.adapt != (given.target is not None):
        raise ValueError("--adapt and --target SPEC go together: statistics of the target's data")
    if given.adapt:
        given.data, given.target = given.target, None
    if bool(given.average) == bool(given.checkpoint):
        raise ValueError("give one --checkpoint FILE, or --average FILE FILE ...")
    if len(given.checkpoint) > 1:
        raise ValueError(
            f"--checkpoint is one file here, not {len(given.checkpoint)}; --average takes several"
        )
    if len(given.average) == 1:
        raise ValueError("--average is of two files at least")
    given.checkpoint = given.average or given.checkpoint
    return given


def _new(
    checkpoint: Checkpoint, weights: Mapping[str, Tensor], report: Recalibration
) -> dict[str, Tensor]:
    """What is to be in the new file: these weights and the new statistics, in the file's types."""
    new = {**weights, **{name: value.cpu() for name, value in report.state.items()}}
    return {name: value.to(checkpoint.state[name].dtype) for name, value in new.items()}


def _write(checkpoint: Checkpoint, new: Mapping[str, Tensor], given: Namespace) -> None:
    """Write, and read back.

    Raises OSError where the file does not hold, to the bit, what it should: it is removed then.
    """
    changed = {n: v for n, v in new.items() if not _same(v, checkpoint.state[n])}
    out = Path(given.out)
    checkpoint.write(out, changed, overwrite=given.overwrite)
    back = Checkpoint.read(out, key=given.state_key, prefix=given.state_prefix).state
    wrong = [name for name, value in new.items() if not _same(value, back[name])]
    if wrong or back.keys() != checkpoint.state.keys():
        out.unlink()
        raise OSError(f"{out} did not hold what was written to it ({wrong[:1]}), and is removed")


def _same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit, NaN included."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*bits)


def _last_line(given: Namespace, checkpoint: Checkpoint) -> str:
    weights = f"bit for bit those of {checkpoint.path}"
    if given.average:
        weights = f"the mean of {len(given.average)} files"
    return f"{given.out} is written: its weights are {weights}"
