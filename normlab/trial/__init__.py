"""`normlab diagnose --trial`: does a diagnosis find what is there, and nothing that is not?

Twenty faults are put into five networks and thirty networks are left healthy; `normlab.diagnose`
is given what its user would have of each.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from normlab.trial.judge import Verdict
    from normlab.trial.training import Size

__all__ = ["OUT", "SEED", "main", "verdicts"]

OUT = Path("results") / "diagnose"
WORK = Path("runs") / "trial"

SEED = 100
"""The first seed: the thresholds of `normlab.diagnose` were chosen on those below 10."""


def main(*, quick: bool = False, results: Path = OUT, work: Path = WORK, seed: int = SEED) -> int:
    """Run the trial, print what came of it, write `trial.csv` and `trial.md`; the exit code.

    quick: a few faults and networks, hardly trained, which shows that everything runs and nothing
    else; written as `trial-quick`. work: keeps what is done, so that an interrupted trial goes on.
    Raises ValueError where CIFAR-10 is not there, ImportError without timm.
    """
    from normlab.trial import write

    done = verdicts(quick=quick, work=work, seed=seed)
    print(write.summary(done))
    for path in write.results(done, results, "trial-quick" if quick else "trial"):
        print(f"wrote {path}")
    return 0


def verdicts(*, quick: bool, work: Path, seed: int) -> "list[Verdict]":
    """Those on every fault in every network, and then those on the healthy ones."""
    from tqdm import tqdm

    from normlab.trial import checkpoints, material
    from normlab.trial.faults import FAULTS
    from normlab.trial.judge import judge
    from normlab.trial.networks import FIVE, THIRTY
    from normlab.trial.store import Store
    from normlab.trial.training import Size

    size = Size(20, 4, 16, 256, 64, 64) if quick else Size()
    five, faults = (FIVE[1::3], FAULTS[::3]) if quick else (FIVE, FAULTS)
    thirty = THIRTY[4:6] if quick else THIRTY
    store = Store(work, size)
    done = []
    with tqdm(total=len(five) * len(faults) + len(thirty), unit="diagnosis", disable=None) as bar:
        for k, network in enumerate(five + thirty):
            at = seed + (k if k < len(five) else k - len(five))
            data = material.load(
                "digits" if network.signals else "cifar10",
                seed=at,
                train=size.train,
                test=size.test,
                signals=network.signals,
            )
            trained = store.trained(network, at, data)
            for fault in faults if k < len(five) else (None,):
                bar.set_postfix_str(f"{network.name} {fault.name if fault else 'healthy'}")
                case = fault.inject if fault else checkpoints.healthy
                done.append(
                    store.verdict(
                        network,
                        fault.name if fault else "",
                        at,
                        lambda: judge(case(trained), fault, trained),
                    )
                )
                bar.update()
    return done
