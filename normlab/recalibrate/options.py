"""What can be chosen, and the options of the command that choose it."""

from argparse import ArgumentParser
from typing import Literal, get_args

from normlab.subject.arguments import add_arguments as add_subject

__all__ = ["Method", "Unknown", "add_arguments"]

Method = Literal["pooled", "mean", "layerwise"]
"""The estimators of `normlab.population.estimate` that weigh all samples alike."""

Unknown = Literal["refuse", "keep"]
"""What happens to layers that have running statistics and are no known batch norms."""


def add_arguments(parser: ArgumentParser) -> None:
    """The options of `normlab recalibrate`."""
    parser.add_argument("--out", required=True, metavar="FILE", help="the new checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    parser.add_argument(
        "--estimator", choices=get_args(Method), default="pooled",
        help="layerwise: as with all data in one batch, a pass for each layer (default: pooled)",
    )  # fmt: skip
    parser.add_argument(
        "--nbs", type=int, metavar="N",
        help="samples that share one set of statistics (default: the batch)",
    )  # fmt: skip
    parser.add_argument(
        "--adapt", action="store_true", help="statistics of --target in place of --data"
    )
    parser.add_argument(
        "--average", nargs="+", default=[], metavar="FILE",
        help="in place of --checkpoint: the mean of these files' weights; the rest is the first's",
    )  # fmt: skip
    parser.add_argument(
        "--unknown", choices=get_args(Unknown), default="refuse",
        help="keep: layers that are no known batch norms keep their statistics (default: refuse)",
    )  # fmt: skip
    add_subject(parser)
