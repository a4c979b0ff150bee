"""One rank of a probe, started as one of a run: ``python -m normlab.forecast.rank RUN_DIR``."""

import sys

from normlab import worker
from normlab.forecast import probing


def main(run_dir: str) -> None:
    """See `worker.main`."""
    worker.main(run_dir, act=probing.take_part)


if __name__ == "__main__":
    main(*sys.argv[1:])
