"""The options of `normlab diagnose`."""

from argparse import ArgumentParser

from normlab.subject.arguments import add_arguments as add_subject

__all__ = ["add_arguments"]


def add_arguments(parser: ArgumentParser) -> None:
    """Those of a subject, the NBS and where the page goes."""
    parser.epilog = (
        "Exit code: 0 without a problem (there may be notices), 1 with one, 2 refused. "
        "`normlab diagnose --trial` takes no model: it counts what a diagnosis finds of faults "
        "that are put into networks."
    )
    parser.add_argument(
        "--nbs", type=int, metavar="N",
        help="samples that shared one set of statistics in training (default: the batch)",
    )  # fmt: skip
    parser.add_argument(
        "--out", metavar="DIR", help="write index.html, layers.csv and findings.csv there"
    )
    parser.add_argument("--rows", type=int, default=12, metavar="N", help="layers in the table")
    add_subject(parser)
