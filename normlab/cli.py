"""`normlab <command> ...`: each command in one line, imported only when it is the one.

Exit codes: 0 done, 1 a run failed or diverged, or some of what was asked for could not be made and
the rest was, or a diagnosis found a problem, 2 refused (one to five lines say why, and nothing was
written), 130 Ctrl-C, 143 SIGTERM.
NORMLAB_TRACEBACK=1 shows where a refusal comes from.
"""

import os
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from argparse import ArgumentParser

HELP = """\
usage: normlab <command> [arguments]

  train   [key=value ...]       one run, or with -m a sweep: normlab train norm=ghost nbs=32
  sweep   EXPERIMENT [...]      the missing runs of an experiment: normlab sweep nbs scale=desk
  sweep   EXPERIMENT --dry-run  what there is to run, and the time, memory and disk it takes
  report  [EXPERIMENT ...]      tables, figures and verdicts from runs/ into results/
  eval    RUN [SPEC ...]        a finished run under further evaluation protocols
  plan    [key=value ...]       how a step's batch is formed: normlab plan batch_size=1024 nbs=32
  equiv   [key=value ...]       ghost, accumulation and ranks form the same batch: in numbers
  show    [WHAT]                norms, convs, models, data, recipes, scales, experiments, ...
  show    norm NAME             the card of a layer: formula, variance, population, limits, errors
  diagnose --model SPEC ...     what is wrong with a trained model's batch norms, and the cure
  diagnose --trial [--quick]    whether it finds faults that were put into networks
  recalibrate --out FILE ...    a trained model's statistics estimated anew, in a new checkpoint
  bench   [TOPIC] [--quick]     the speed of training, data and statistics; of layers; of ranks

normlab <command> --help tells more; normlab --version.
Shell completion: eval "$(normlab -sc install=bash)"
"""


RUNS = "runs"
"""Where run directories lie unless another place is named: there may be none yet."""


def train(argv: list[str]) -> int:
    from normlab import app

    return app.train(argv)


def sweep(argv: list[str]) -> int:
    from normlab import app

    return app.sweep(argv)


def report(argv: list[str]) -> int:
    parser = _parser("report", "Tables, figures, verdicts and one page over all experiments.")
    parser.add_argument(
        "experiment", nargs="*", help="whose report to print, and to take runs into (default: all)"
    )
    _add_runs(parser)
    parser.add_argument(
        "--results", default="results", help="where to write, and what is committed"
    )
    parser.add_argument(
        "--refresh", action="store_true", help="let local runs replace committed ones"
    )
    given = parser.parse_args(argv)
    from normlab.report import main as write

    return write(
        given.experiment, runs=given.runs or RUNS, results=given.results, refresh=given.refresh
    )


def evaluate(argv: list[str]) -> int:
    parser = _parser("eval", "A finished run under further protocols, added to its evals.csv.")
    parser.add_argument("run", help="a run's id, its beginning, or its directory")
    parser.add_argument("spec", nargs="+", help="e.g. test:ema; see normlab show protocols")
    _add_runs(parser)
    parser.add_argument("--data-root", help="where data sets lie (default: as in the run)")
    given = parser.parse_args(argv)
    from normlab import app

    return app.evaluate(given.run, given.spec, root=given.runs or RUNS, data_root=given.data_root)


def plan(argv: list[str]) -> int:
    parser = _parser("plan", "How the batch of one SGD step is formed.")
    parser.add_argument(
        "override", nargs="*", help="batch_size=1024 nbs=32 ..., experiment=renorm arm=br-4"
    )
    from normlab import show

    return show.plan(parser.parse_args(argv).override)


def equiv(argv: list[str]) -> int:
    parser = _parser("equiv", "Three ways to form a step's batch, compared in float64.")
    parser.add_argument("override", nargs="*", help="model=resnet8 batch_size=64 nbs=16 ...")
    given = parser.parse_args(argv)
    from normlab.equiv import main as compare

    return compare(given.override)


def show(argv: list[str]) -> int:
    from normlab import show

    parser = _parser("show", "What there is.")
    parser.add_argument(
        "what", nargs="?", choices=[*show.TABLES, "norm"], help="default: a list of these"
    )
    parser.add_argument("name", nargs="?", help="of `show norm`: the layer whose card to print")
    parser.add_argument("--all", action="store_true", help="of `show norm`: the page of all cards")
    _add_runs(parser)
    given = parser.parse_args(argv)
    if given.what == "norm":
        return show.norm(given.name, every=given.all)
    if given.name or given.all:
        raise ValueError(
            f"show {given.what or ''} takes no {given.name or '--all'}: show norm does"
        )
    return show.main(given.what, root=given.runs or RUNS)


def bench(argv: list[str]) -> int:
    parser = _parser("bench", "Speed against the stock ways of the same; fills results/bench.")
    parser.add_argument(
        "topic",
        nargs="?",
        choices=["runs", "layers", "ranks"],
        help="runs: training, data, statistics",
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds: four minutes for all")
    given = parser.parse_args(argv)
    from normlab.bench import main as measure

    return measure([*filter(None, [given.topic]), *["--quick"] * given.quick])


def recalibrate(argv: list[str]) -> int:
    from normlab.recalibrate.options import add_arguments

    parser = _parser(
        "recalibrate",
        "A checkpoint's batch-norm statistics estimated anew, in a new file; weights stay.",
    )
    add_arguments(parser)
    given = parser.parse_args(argv)
    from normlab.recalibrate.command import main as carry_out

    return carry_out(given)


def diagnose(argv: list[str]) -> int:
    from normlab.diagnose.options import add_arguments

    if "--trial" in argv:
        return _trial(argv)
    parser = _parser("diagnose", "What is wrong with a trained model's batch norms, and the cure.")
    add_arguments(parser)
    given = parser.parse_args(argv)
    from normlab.diagnose.command import main as carry_out

    return carry_out(given)


def _trial(argv: list[str]) -> int:
    parser = _parser("diagnose", "Whether a diagnosis finds faults that were put into networks.")
    parser.add_argument("--trial", action="store_true", required=True, help="do that")
    parser.add_argument("--quick", action="store_true", help="a few, hardly trained: two minutes")
    given = parser.parse_args(argv)
    from normlab.trial import main as judge

    return judge(quick=given.quick)


COMMANDS = {
    "train": train,
    "sweep": sweep,
    "report": report,
    "eval": evaluate,
    "plan": plan,
    "equiv": equiv,
    "show": show,
    "diagnose": diagnose,
    "recalibrate": recalibrate,
    "bench": bench,
}


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        return _dispatch(argv)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        if os.environ.get("NORMLAB_TRACEBACK"):
            raise
        from normlab.app import in_words

        print(f"normlab: {in_words(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("normlab: interrupted", file=sys.stderr)
        return 130
    except SystemExit as stop:  # argparse and Hydra leave through it after --help
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 2
    finally:
        signal.signal(signal.SIGTERM, before)


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP, end="", file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        from normlab import __version__

        print(f"normlab {__version__}")
        return 0
    if argv[0] in ("-sc", "--shell-completion"):
        return _complete(argv)
    if argv[0] not in COMMANDS:
        raise ValueError(
            f"no command '{argv[0]}'{_near(argv[0], list(COMMANDS))} "
            f"(commands: {', '.join(COMMANDS)})"
        )
    return COMMANDS[argv[0]](argv[1:])


def _complete(argv: list[str]) -> int:
    """Hydra's completion knows no commands: offer ours, and hand it the words after one of its."""
    if any(word.startswith("query=") for word in argv):
        words = os.environ.get("COMP_LINE", "").split(" ")
        if len(words) < 3:
            print(" ".join(COMMANDS))
            return 0
        if len(words) == 3 and words[1] in ("sweep", "report"):
            from normlab import experiment

            print(" ".join(experiment.names()))
            return 0
        if words[1] not in ("train", "sweep"):
            return 0
        words[1:3] = words[2:3] if words[1] == "train" else []
        os.environ["COMP_LINE"] = " ".join(words)
    return train(argv)


def _terminate(signum: int, _: FrameType | None) -> NoReturn:
    sys.exit(128 + signum)


def _near(word: str, known: list[str]) -> str:
    from difflib import get_close_matches

    close = get_close_matches(word, known, 1)
    return f"; did you mean '{close[0]}'?" if close else ""


def _parser(command: str, description: str) -> "ArgumentParser":
    """argparse, whose complaints are one line like all others."""
    from argparse import ArgumentParser

    class Parser(ArgumentParser):
        def error(self, message: str) -> NoReturn:
            unknown = message.removeprefix("unrecognized arguments: ").split(" ")[0].split("=")[0]
            options = [option for action in self._actions for option in action.option_strings]
            near = _near(unknown, options) if unknown.startswith("-") else ""
            raise ValueError(f"{command}: {message}{near} (normlab {command} --help)")

    return Parser(prog=f"normlab {command}", description=description, allow_abbrev=False)


def _add_runs(parser: "ArgumentParser") -> None:
    """`--runs`, which a typing error shall not turn into a table of nothing."""
    from argparse import ArgumentTypeError
    from pathlib import Path

    def directory(given: str) -> str:
        if not Path(given).is_dir():
            raise ArgumentTypeError(f"'{given}' is not a directory")
        return given

    parser.add_argument(
        "--runs", type=directory, help=f"where run directories lie (default: {RUNS})"
    )
