"""`normlab train` and `normlab sweep`: the Hydra applications around ``normlab.launch.run``.

Hydra composes, sweeps and launches, and leaves nothing behind: run directories are made by the
runs. Every job notes what became of it in a scratch directory, because launchers in other processes
hand nothing back; the exit code and the closing lines are made from these notes.
"""

import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from normlab import config, engines, experiment, plugins

if TYPE_CHECKING:
    from normlab.outcome import Outcome

DRY = "--dry-run"
TOLD = 8
"""Numbers of a run in its line of a sweep; `normlab train` alone shows all."""

_WITH_VALUE = {
    "-c", "--cfg", "-p", "--package", "-cp", "--config-path", "-cn", "--config-name", "-cd",
    "--config-dir", "-i", "--info",
}  # fmt: skip
_ONLY_SHOWS = {"-h", "--help", "--hydra-help", "-c", "--cfg", "-i", "--info"}


def train(argv: list[str]) -> int:
    """Run what the overrides describe, once or as a sweep; returns the exit code.

    0: all done. 1: a run failed or diverged, or some of what was asked for was refused, or can be
    had of a finished run no more, while the rest was made. 2: the same, and nothing was written.
    Raises ConfigError where not even a job could be composed.
    """
    _refuse_torchrun()
    flags, overrides = _split(argv)
    runs = _parse(flags, overrides)
    config.check_resume(overrides)
    config.register(overrides)
    with (
        engines.scratch(overrides) as scratch,
        engines.prepared(overrides) as more,
        _hydra_argv(flags, [*more, *overrides], scratch),
    ):
        import hydra

        conf = str(plugins.package_dir("conf"))
        application = hydra.main(config_path=conf, config_name="config", version_base="1.3")(task)
        try:
            with config.explained():
                application()
        except KeyboardInterrupt:
            _close(engines.notes(scratch))
            raise
        except Exception as error:  # a job was killed: the engine raises something of its own
            refused = isinstance(error, ValueError | OSError)
            if refused or engines.chosen(overrides) == "basic" or _with_traceback():
                raise
            _close(engines.notes(scratch))
            kind, reason = type(error).__name__, in_words(error).splitlines()[0]
            print(
                f"normlab: {engines.chosen(overrides)} gave up ({kind}: {reason})\n"
                "normlab: the same command resumes what is not finished",
                file=sys.stderr,
            )
            return 1
        code = _close(engines.notes(scratch), _jobs(scratch) if runs else 0)
        if code == 2:  # nothing was written
            shutil.rmtree(scratch, ignore_errors=True)
        return code


def _jobs(scratch: Path) -> int:
    """How many jobs there were: Hydra's sweeper records in its directory what it has swept."""
    if not (record := scratch / "multirun.yaml").exists():
        return 1
    swept = OmegaConf.load(record).hydra
    axes = [f"{key}={values}" for key, values in (swept.sweeper.params or {}).items()]
    return len(config.combined([*axes, *swept.overrides.task]))


def _refuse_torchrun() -> None:
    """Each rank would compose the run, and sweep, by itself."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "TORCHELASTIC_RUN_ID" in os.environ:
        raise config.ConfigError(
            "normlab train starts ranks by itself (world_size=N); torchrun starts those of a run "
            "that is prepared: normlab train ... launch=false says how"
        )


def sweep(argv: list[str]) -> int:
    """`normlab sweep <name> ...`: the missing cells, as `train -m experiment=<name> ...`.

    With --dry-run none of them is run: printed is what there is to do, and what it takes.
    """
    if not argv or argv[0].startswith("-") or "=" in argv[0]:
        if {"-h", "--help"} & set(argv):
            return train(argv)
        known = ", ".join(experiment.names())
        raise config.ConfigError(f"sweep which experiment? normlab sweep <name> (names: {known})")
    experiment.load(argv[0])
    if DRY in argv:
        from normlab import forecast

        flags, overrides = _split([word for word in argv[1:] if word != DRY])
        if flags:
            raise config.ConfigError(f"sweep {DRY} takes overrides (key=value), got {flags[0]}")
        _parse([], overrides)
        return forecast.main(argv[0], overrides)
    multirun = [] if _ONLY_SHOWS & set(argv) else ["-m"]
    return train([*multirun, f"experiment={argv[0]}", *argv[1:]])


def task(cfg: DictConfig) -> None:
    """One job, from the composed config to a finished run; launchers pickle it by its name."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from normlab import launch

    hydra = HydraConfig.get()
    sweeping = hydra.mode == RunMode.MULTIRUN
    note: dict[str, Any] = {"sweep": sweeping}
    try:
        outcome = launch.run(config.resolve(cfg), config.keys(hydra.overrides.task))
    except launch.JobError as error:
        note |= {"status": "failed", "message": str(error)}
    except (ValueError, OSError) as error:
        if _with_traceback():
            raise
        note |= {"status": "refused", "message": in_words(error)}
    else:
        note |= {"status": outcome.status, "skipped": outcome.skipped}
        note |= {"lacking": bool(outcome.lacking)}
        if outcome.status == "diverged":
            last = "" if outcome.recorded else "its last finite numbers are in "
            note["message"] = f"{outcome.id} diverged: {last}{outcome.place}"
        elif outcome.lacking:
            note["message"] = outcome.lacking
        print(_line(outcome) if sweeping else _table(outcome), flush=True)
    try:
        engines.leave(Path(hydra.sweep.dir), hydra.job.num if sweeping else 0, note)
    except OSError as error:  # the run is what it is, and other jobs go on
        print(f"normlab: no note of this job: {in_words(error)}", file=sys.stderr)


def evaluate(run: str, specs: list[str], *, root: str, data_root: str | None) -> int:
    """`normlab eval`: a finished run under further protocols; returns the exit code.

    Raises ValueError or OSError for what cannot be evaluated.
    """
    from normlab import launch

    try:
        outcome = launch.evaluate(run, specs, root=root, data_root=data_root)
    except launch.JobError as error:
        print(f"normlab: {error}", file=sys.stderr)
        return 1
    print(_table(outcome), flush=True)
    if not outcome.lacking:
        return 0
    print(f"normlab: {outcome.lacking}", file=sys.stderr)
    return 2 if outcome.skipped else 1


def _with_traceback() -> bool:
    return bool(os.environ.get("NORMLAB_TRACEBACK"))


def in_words(error: Exception) -> str:
    """An exception as one to five lines; files are named with what is wrong with them."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    lines = [line for line in str(error).splitlines() if line.strip()]
    return "\n".join(lines[:5]) or type(error).__name__


def _line(outcome: "Outcome") -> str:
    numbers = [f"{spec} {error:.2f}" for spec, error in outcome.summary.items()]
    numbers += [f"{name} {value:.4g}" for name, value in outcome.values.items()]
    more = f"  and {len(numbers) - TOLD} more" if len(numbers) > TOLD else ""
    told = "  ".join(numbers[:TOLD]) + more or outcome.command
    return f"{outcome.id}  {'skipped' if outcome.skipped else outcome.status}  {told}".rstrip()


def _table(outcome: "Outcome") -> str:
    """id, status, the error of each evaluation, what probes have measured, and where it lies."""
    rows = [("run", outcome.id), ("status", outcome.status + ", skipped" * outcome.skipped)]
    rows += [(spec, f"{error:.2f} % error") for spec, error in outcome.summary.items()]
    rows += [(name, f"{value:.4g}") for name, value in outcome.values.items()]
    rows.append(("directory", outcome.place))
    if outcome.command:
        rows.append(("command", outcome.command))
    width = max(len(key) for key, _ in rows)
    return "\n".join(f"{key:<{width}}  {value}" for key, value in rows)


def _close(notes: list[dict[str, Any]], jobs: int = 0) -> int:
    """Print a sweep's summary and what went wrong (at most five lines); returns the exit code.

    jobs: how many should have left a note.
    """
    if any(note["sweep"] for note in notes):
        count = Counter(note["status"] for note in notes)
        skipped = sum(note["status"] == "done" and note["skipped"] for note in notes)
        lacking = sum(note.get("lacking", False) for note in notes)
        print(
            f"{len(notes)} cells: {count['done']} done ({count['done'] - skipped} run, "
            f"{skipped} skipped), {count['diverged']} diverged, "
            f"{count['failed']} failed, {count['refused']} refused"
            + (f", {count['prepared']} prepared" if count["prepared"] else "")
            + (f"; {lacking} of the done without all that was asked for" if lacking else "")
        )
    messages = Counter(note["message"] for note in notes if "message" in note)
    said = [
        f"normlab: {message}" + (f" ({times} cells)" if times > 1 else "")
        for message, times in messages.items()
    ]
    if (lost := jobs - len(notes)) > 0:
        said.insert(
            0,
            f"normlab: {lost} of {jobs} jobs left no note of what became of them: the same command "
            "resumes what is not finished",
        )
    if len(said) > 1:  # five lines at most, one for each kind of trouble
        more = f"normlab: and {len(said) - 4} more" if len(said) > 5 else ""
        said = [text.splitlines()[0] for text in said[: 4 if more else 5]] + (
            [more] if more else []
        )
    print("\n".join(said), end="\n" if said else "", file=sys.stderr)
    if lost > 0:
        return 1
    statuses = {note["status"] for note in notes}
    if "refused" in statuses or any(note.get("lacking") for note in notes):
        # 2 promises that nothing was written.
        return 2 if all(n["status"] == "refused" or n.get("skipped") for n in notes) else 1
    return 1 if statuses & {"failed", "diverged"} else 0


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Flags with their values, and overrides: Hydra 1.3 does not take the two interleaved."""
    flags, overrides = [], []
    words = iter(argv)
    for word in words:
        if not word.startswith("-"):
            overrides.append(word)
            continue
        flags.append(word)
        if word in _WITH_VALUE and (value := next(words, None)) is not None:
            takes = "=" not in value or word not in ("-i", "--info")
            (flags if takes else overrides).append(value)
    return flags, overrides


def _parse(flags: list[str], overrides: list[str]) -> bool:
    """Whether Hydra would run anything; what its parser would refuse is refused in one line."""
    from hydra._internal.utils import get_args_parser  # hydra.main has no other way to say it

    parser, said = get_args_parser(), StringIO()
    try:
        with redirect_stderr(said):
            given = parser.parse_args([*flags, "--", *overrides])
    except SystemExit:
        message = said.getvalue().rpartition("error: ")[2].strip()
        known = [option for action in parser._actions for option in action.option_strings]
        unknown = message.removeprefix("unrecognized arguments: ").split()[0]
        raise config.ConfigError(message + config.near(unknown, known)) from None
    shows = (given.help, given.hydra_help, given.cfg, given.shell_completion)
    return not any(shows) and given.info is None


@contextmanager
def _hydra_argv(flags: list[str], overrides: list[str], scratch: Path) -> Iterator[None]:
    """Hydra reads the command line, and with HYDRA_FULL_ERROR leaves the printing to us."""
    from hydra.core.global_hydra import GlobalHydra

    argv, full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = ["normlab", *flags, "--", *overrides, f"hydra.sweep.dir={scratch}"]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        sys.argv = argv
        if full is None:
            del os.environ["HYDRA_FULL_ERROR"]
