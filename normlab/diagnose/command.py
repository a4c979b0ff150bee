"""`normlab diagnose`: a user's model diagnosed, on the terminal and as a page."""

import shlex
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from normlab.diagnose import terminal
from normlab.diagnose.diagnosis import Diagnosis, diagnose
from normlab.diagnose.findings import ADAPT, AVERAGE, RECALIBRATE
from normlab.subject.arguments import from_arguments

__all__ = ["cured", "main"]


def main(given: Namespace) -> int:
    """Diagnose what the options name, print and write it; 1 if there is a problem, else 0.

    The first of several checkpoints is diagnosed. Raises ValueError where something is refused,
    and before any forward for an --out that is no directory.
    """
    if given.out is not None and Path(given.out).exists() and not Path(given.out).is_dir():
        raise ValueError(f"--out {given.out} is a file: it is to be a directory")
    if given.rows < 1:
        raise ValueError(f"--rows is 1 at least, not {given.rows}")
    subject = from_arguments(given)
    found = diagnose(
        subject.model,
        subject.train,
        test=subject.test,
        target=subject.target,
        scoring=subject.scoring,
        optimizer=subject.checkpoint.optimizer if subject.checkpoint else None,
        states=[other.state for other in subject.others],
        nbs=given.nbs,
    )
    found = cured(found, given)
    print(terminal.text(found, rows=given.rows))
    if given.out is not None:
        from normlab.diagnose.page import write

        print(f"\n{write(found, Path(given.out), title=_title(given))}")
    return 0 if found.healthy else 1


def _title(given: Namespace) -> str:
    return " ".join([given.model, *given.checkpoint[:1]])


def cured(found: Diagnosis, given: Namespace) -> Diagnosis:
    """With the cures' commands as this command line would have them."""
    model = ["--model", given.model]
    for pair in given.model_arg:
        model += ["--model-arg", pair]
    for name in ("state_key", "state_prefix"):
        if getattr(given, name):
            model += [f"--{name.replace('_', '-')}", getattr(given, name)]
    data = []
    if given.image_size:
        data += ["--image-size", str(given.image_size)]
    for name in ("mean", "std"):
        if getattr(given, name):
            data += [f"--{name}", *map(str, getattr(given, name))]
    for name in ("forward", "loss"):
        if getattr(given, name):
            data += [f"--{name}", getattr(given, name)]
    data += ["--out", "recalibrated.pt"]
    checkpoint = ["--checkpoint", *(given.checkpoint[:1] or ["FILE"])]
    command = RECALIBRATE.strip("`")
    words = {  # the longer ones first: they begin like the last
        AVERAGE: ["--average", *given.checkpoint[1:], *model, "--data", given.data, *data],
        ADAPT: ["--adapt", *checkpoint, *model, "--target", given.target or "SPEC", *data],
        RECALIBRATE: [*checkpoint, *model, "--data", given.data, *data],
    }

    def full(cure: str) -> str:
        for short, options in words.items():
            cure = cure.replace(short, f"`{command} {shlex.join(options)}`")
        return cure

    return replace(found, findings=[replace(f, cure=full(f.cure)) for f in found.findings])
