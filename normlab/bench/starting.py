"""How long one waits: for the help, and for the first step of a further run in the same process."""

import json
import os
import subprocess
import sys
import tempfile
import time

from normlab.bench.measure import Row, limit_row

HELP_LIMIT = 0.150
START_LIMIT = 1.0


def help_row(*, rounds: int) -> Row:
    """CPU time of ``normlab --help``, from the start of the process to its end."""
    seconds = []
    for _ in range(rounds + 1):
        process = subprocess.Popen(
            [sys.executable, "-m", "normlab", "--help"], stdout=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"normlab --help ended with {process.returncode}")
        seconds.append(usage.ru_utime + usage.ru_stime)
    return limit_row(
        "normlab --help", seconds[1:], limit=HELP_LIMIT, clock="CPU time of the process"
    )


def second_run_row(*, rounds: int) -> Row:
    """From starting a run to its first training step, in a process that has run one before."""
    code = f"from normlab.bench import starting; starting.start_runs({rounds + 1})"
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True
    )
    seconds = json.loads(done.stdout.splitlines()[-1])
    return limit_row(
        "a second run's first step", seconds[1:], limit=START_LIMIT, clock="elapsed time"
    )


def start_runs(count: int) -> None:
    """Run ``count`` short runs one after another; print the seconds to each one's first step."""
    from torch import Tensor

    from normlab import config, launch
    from normlab.train import Trainer

    first_steps: list[float] = []
    step = Trainer._train_step

    def noted(self: Trainer, x: Tensor, y: Tensor, extra: Tensor | None = None) -> None:
        first_steps.append(time.perf_counter())
        step(self, x, y, extra)

    Trainer._train_step = noted  # type: ignore[method-assign]
    seconds = []
    with tempfile.TemporaryDirectory() as directory:
        for seed in range(count):
            overrides = ["scale=demo", "epochs=1", f"seed={seed}", f"runs={directory}", "threads=1"]
            composed = config.compose([*overrides, "evals=[train:augmented]", "skip_done=local"])
            first_steps.clear()
            started = time.perf_counter()
            launch.run(composed)
            seconds.append(first_steps[0] - started)
    print(json.dumps(seconds))
