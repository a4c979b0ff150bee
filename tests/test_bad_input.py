"""A table of bad input: each is refused in one to five lines, with exit code 2, and writes nothing.

The lines say what is wrong and what is allowed. Every kind of failure has a label; the table counts
them at the end.
"""

import hashlib
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from normlab import cli, plugins

SMALL = "data=synthetic data.n=64 batch_size=16 epochs=2 evals=[val:ema]"
"""A run of a second, for the cases about runs."""


@dataclass(frozen=True)
class Case:
    kind: str
    line: str
    says: tuple[str, ...]


def case(kind: str, line: str, *says: str) -> Case:
    return Case(kind, line, says)


CASES = [
    case("command", "tran", "tran", "did you mean 'train'", "sweep"),
    case("command", "Report", "Report", "did you mean 'report'"),
    case("command", "norm=ghost", "norm=ghost", "commands: train"),
    case("command", "--verison", "--verison", "commands: train"),
    case("flag", "train --multrun nbs=2", "--multrun", "--multirun"),
    case("flag", "train --cfg", "--cfg", "expected one argument"),
    case("flag", "train --cfg jobs", "jobs", "job"),
    case("flag", "report --runz x", "--runz", "--runs"),
    case("flag", "eval", "eval", "run"),
    case("flag", "eval somerun", "eval", "spec"),
    case("flag", "show norm", "norm", "norms"),
    case("flag", "plan --nbs 4", "--nbs", "plan --help"),
    case("flag", "bench --quik", "--quik"),
    case("flag", "eval RUN test:ema --device gpu", "--device"),
    case("unknown key", "train nsb=4", "nsb", "did you mean 'nbs'"),
    case("unknown key", "train +bogus=1", "bogus", "batch_size"),
    case("unknown key", "train ++lrr=1", "lrr", "did you mean 'lr'"),
    case("unknown key", "train recipe.momentun=0.9", "recipe.momentun", "momentum"),
    case("unknown key", "train norm=gn norm.group=4", "norm.group", "did you mean 'groups'"),
    case("unknown key", "train model.depth=8", "model.depth", "width"),
    case("unknown key", "train +norm.foo=1", "norm.foo", "eps"),
    case("unknown key", "train +data.foo=1", "data.foo", "subset"),
    case("unknown key", "plan nsb=4", "nsb", "did you mean 'nbs'"),
    case("unknown key", "train ~lr", "lr"),
    case("wrong type", "train nbs=abc", "nbs", "abc", "integer or null"),
    case("wrong type", "train nbs=2.5", "nbs", "2.5", "integer or null"),
    case("wrong type", "train lr=fast", "lr", "fast", "a number"),
    case("wrong type", "train epochs=null", "epochs", "an integer"),
    case("wrong type", "train compile=perhaps", "compile", "perhaps", "true or false"),
    case("wrong type", "train recipe.milestones=half", "recipe.milestones", "list of numbers"),
    case("wrong type", "train evals=val:ema", "evals", "a list"),
    case("wrong type", "train norm=gn norm.groups=x", "norm.groups", "'x'", "int"),
    case("wrong type", "train norm.eps=small", "norm.eps", "float"),
    case("wrong type", "train model.width=1.5", "model.width", "int"),
    case("wrong type", "train norm=null", "norm=null", "ghost"),
    case("wrong type", "train model=20", "model=20", "resnet20"),
    case("syntax", "train nbs", "'nbs'", "key=value"),
    case("syntax", "train =4", "=4"),
    case("syntax", "train evals=[val:ema", "[val:ema"),
    case("syntax", "train nbs=2,4", "nbs=2,4", "--multirun"),
    case("syntax", "train runs=日本", "runs=日本", "cannot be read", """'runs="日本"'"""),
    case("syntax", "train -m seed=0,1 runs=ü", "runs=ü", "cannot be read", """'runs="ü"'"""),
    case("syntax", "train runs=$(whoami)", "runs=$(whoami)", "cannot be read", "quotes"),
    case("syntax", "plan nbs='", "nbs='", "cannot be read", "quotes must close"),
    case("unknown option", "train norm=ghst", "ghst", "did you mean 'ghost'", "bn"),
    case("unknown option", "train model=resnet21", "resnet21", "resnet20"),
    case("unknown option", "train data=mnist", "mnist", "digits"),
    case("unknown option", "train recipe=adam", "adam", "cosine"),
    case("unknown option", "train scale=desktop", "desktop", "desk"),
    case("unknown option", "train norm=a/b", "a/b", "no path", "ghost"),
    case("unknown option", "train norm=../norm/bn", "norm=../norm/bn", "no path", "ghost"),
    case("unknown option", "train scale=../scale/desk", "scale=../scale/desk", "no path", "demo"),
    case("unknown option", "train norm.population=median norm=ghost nbs=8", "median", "mean"),
    case("unknown option", "train data.augment=mixup", "mixup", "none"),
    case("experiment", "train experiment=nsb", "nsb", "nbs"),
    case("experiment", "sweep nsb", "nsb", "nbs"),
    case("experiment", "sweep", "which experiment", "nbs"),
    case("experiment", "sweep scale=desk", "which experiment", "nbs"),
    case("experiment", "sweep nbs scale=tiny", "tiny", "demo, desk, gpu, paper"),
    case("experiment", "train -m experiment=nbs,nbs", "nbs,nbs", "one experiment"),
    case("experiment", "report nsb", "nsb", "nbs"),
    case(
        "arms",
        "sweep renorm nbs=4 seed=100",
        "nbs=4: arms of renorm set nbs",
        "arm=bn-4,br-4,bn-4-tuned,br-4-tuned ",
    ),
    case(
        "arms",
        "train experiment=renorm norm=gn",
        "arms of renorm set norm",
        "type arm=gn,gn-tuned for",
    ),
    case("arms", "sweep norms lr=0.1", "set lr themselves (bn-tuned", "arm=bn,ln,", "leave these"),
    case(
        "arms",
        "plan experiment=renorm nbs=4",
        "arms of renorm set nbs",
        "arm=bn-4,br-4,bn-4-tuned,br-4-tuned ",
    ),
    case("launcher", "train -m nbs=2 hydra/launcher=ray", "ray", "basic"),
    case("launcher", "train -m nbs=2 hydra/launcher=slurm", "slurm", "basic"),
    case("range", "train lr=-1", "lr", "above 0"),
    case("range", "train lr=nan", "lr=nan", "finite"),
    case("range", "train epochs=0", "epochs=0 trains nothing", "init_from=<file>"),
    case("range", "train decay=1", "decay=1.0", "below 1"),
    case("range", "train decay=-0.1", "decay=-0.1", "at least 0"),
    case("range", "train precision=fp16", "precision=fp16", "bf16"),
    case("range", "train device=gpu", "device=gpu", "cuda"),
    case("range", "train seed=-1", "seed", "at least 0"),
    case("range", "train seed=99999999999999999999999", "seed", "at most 2147483647"),
    case("range", "train epochs=99999999999999999999999", "epochs", "at most 2147483647"),
    case("range", "plan batch_size=99999999999999999999999 nbs=7", "batch_size", "2147483647"),
    case("range", "train model.width=99999999999999999999999", "model.width", "2147483647"),
    case("range", "train norm.eps=nan", "norm.eps=nan", "finite"),
    case("range", "train runs=", "runs", "directory"),
    case("range", "train norm.batch=chunky", "norm.batch=chunky", "per_rank, ghost"),
    case("range", "train norm.batch=ghost nbs=8", "norm.batch=ghost", "norm=bn", "per_rank"),
    case("range", "train ema_bank=[2]", "ema_bank", "below 1"),
    case("range", "train recipe.warmup=5", "recipe.warmup", "below 1"),
    case("range", "train recipe.schedule=poly", "recipe.schedule=poly", "cosine"),
    case("range", "train buffers=sum", "buffers=sum", "average, mean, broadcast"),
    case("sync", "plan sync_group_size=2 world_size=2", "sync_group_size=2", "norm=sync"),
    case("sync", "plan norm=sync sync_group_size=3 world_size=4", "3", "world_size=4"),
    case("sync", "train sync_layers=layer4.*", "sync_layers=layer4.*", "norm=bn"),
    case("range", "train -m epochs=-1 seed=0,1", "epochs", "at least 0", "2 cells"),
    case("batch plan", "train nbs=0", "nbs=0", "at least 2"),
    case("batch plan", "train nbs=-4", "nbs=-4", "at least 2"),
    case("batch plan", "train nbs=1", "nbs=1", "instance norm"),
    case("batch plan", "train nbs=48 batch_size=128", "nbs=48", "batch_size=128", "32 or 64"),
    case("batch plan", "train nbs=256 batch_size=128", "nbs=256", "batch_size=128", "nbs=128"),
    case("batch plan", "train norm=ghost", "norm=ghost", "needs nbs"),
    case("batch plan", "train nbs=8 norm=gn", "norm=gn", "nbs=8"),
    case("batch plan", "train micro_batch=24 batch_size=128", "micro_batch=24", "batch_size=128"),
    case("batch plan", "train batch_size=0", "batch_size", "at least 1"),
    case("batch plan", "train batch_size=2000", "batch_size=2000", "997"),
    case("batch plan", "train remainder=error", "remainder=error", "997", "batch_size"),
    case("batch plan", "plan nbs=48 batch_size=128", "nbs=48", "batch_size=128", "32 or 64"),
    case("batch plan", "plan batch_size=100 world_size=3", "world_size=3", "batch_size=100"),
    case("order", "train order=random", "order=random", "shuffled, sorted"),
    case("order", "train order=4", "order=4", "16x2"),
    case("order", "train order=0x2", "order=0x2", "16x2"),
    case("order", "train order=null", "order", "a word"),
    case("order", "train ordr=sorted", "ordr", "did you mean 'order'"),
    case("order", "train order=3x2", "order=3x2", "batch_size=128", "a multiple of 6"),
    case("order", "train order=4x4 norm=ghost nbs=8", "order=4x4", "nbs=8", "a multiple of 16"),
    case("order", "train order=16x2", "order=16x2", "16 labels", "10 classes"),
    case("order", "train order=1x128", "order=1x128", "128 samples of a label", "class"),
    case("order", "train order=2x64 batch_size=1024", "order=2x64", "640 of 997", "no step"),
    case("order", "train order=8x4 remainder=error", "order=8x4", "of 997", "remainder=error"),
    case("order", "train order=sorted remainder=error", "997", "remainder=error"),
    case("layer", "train norm=gn norm.channels_per_group=4", "groups", "channels_per_group"),
    case("layer", "train norm=gn norm.groups=5", "5", "16"),
    case("layer", "train model.width=0", "model.width=0", "at least 1"),
    case("layer", "train model.width=4000000", "model=tiny", "allocate"),  # 500 TB
    case("layer", "train model=resnet20 model.stages=5 data=synthetic", "stages", "3"),
    case("evaluation", "train evals=[val:emma]", "val:emma", "precise"),
    case("evaluation", "train evals=[tset:ema]", "tset:ema", "train, val, test"),
    case("evaluation", "train evals=[val:augmented]", "val:augmented", "train:augmented"),
    case("evaluation", "train evals=[val:batch/batch:1]", "batch", "at least 2"),
    case("evaluation", "train evals=[val:ema/decay:0.9]", "decay:0.9", "ema_bank"),
    case("evaluation", "train evals=[val:batch/order:1000]", "order:1000", "0..999"),
    case("evaluation", "train batch_size=512", "val:batch", "512", "300"),
    case("evaluation", "train evals=[val:batch/pattern:4b2]", "pattern:4b2", "16x2"),
    case("evaluation", "train evals=[val:batch/pattern:3x2]", "groups of 6", "batches of 128"),
    case("evaluation", "eval RUN val:emma", "val:emma", "precise"),
    case("evaluation", "eval RUN tset:ema", "tset:ema", "test"),
    case("run", "eval nosuchrun val:ema", "nosuchrun", "runs"),
    case("run", "eval RUN test:ema --runs elsewhere", "elsewhere"),
    case("run", "eval spoilt test:ema", "checkpoint.pt"),
    case("run", "eval unfinished test:ema", "unfinished", "finished"),
    case("run", "train resume=nosuchrun", "nosuchrun", "runs"),
    case("run", "train resume=foreign", "foreign is no run", "lacks norm, model, data, recipe"),
    case("run", "train resume=foreign world_size=2", "foreign is no run", "lacks"),
    case("run", "eval foreign val:ema", "foreign is no run", "lacks norm, model, data, recipe"),
    case("run", "train resume=RUN world_size=0", "world_size=0", "at least 1"),
    case("run", "report --runs nonsense", "--runs", "nonsense", "not a directory"),
    case("run", "show runs --runs nonsense", "--runs", "nonsense", "not a directory"),
    # The weights of its first epoch are gone, and what was not tracked cannot be read.
    case("run", f"train {SMALL} eval_last=2", "eval_last=2", "epoch 1", "delete", "runs="),
    case(
        "run",
        f"train {SMALL} eval_at=[1]",
        "eval_at=[1]",
        "epoch 1",
        "delete",
        "runs=",
    ),
    case("run", f"train {SMALL} ema_bank=[0.5]", "ema_bank=[0.5]", "tracked []", "delete", "runs="),
    case("run", f"train -m seed=0,0 {SMALL} eval_last=2", "epoch 1", "(2 cells)"),
    case(
        "run",
        f"train {SMALL} ema_bank=[0.5] evals=[val:ema/decay:0.5]",
        "ema_bank=[0.5]",
        "tracked []",
        "delete",
        "runs=",
    ),
    case("run", f"train {SMALL} runs=spoilt_runs", "checkpoint.pt"),
    case("probe", "train probes=[ema_trac]", "ema_trac", "did you mean 'ema_trace'"),
    case("probe", "train probes=[base]", "base", "ema_trace, feature_evolution"),
    case("probe", "train probes=ema_trace", "probes", "a list"),
    case("probe", "train probes=[ema_trace,ema_trace]", "probes", "twice"),
    case("probe", "train probes=[ema_trace] norm=gn", "ema_trace", "norm=bn"),
    case("probe", "train probes=[ema_trace] norm=none", "ema_trace", "population statistics"),
    case("probe", "train eval_at=[16] epochs=15", "eval_at", "16", "epochs=15"),
    case("probe", "train eval_at=[-1]", "eval_at", "-1", "0 (before training)"),
    case("probe", "train eval_at=[0.5]", "eval_at", "0.5", "Integer"),
    case("probe", "train eval_at=5", "eval_at", "list of integers"),
    case("task", "train task=gam", "gam", "classifier"),
    case("task", "train task=null", "task", "classifier"),
    case("task", "train task.steps=3", "task.steps"),
    case("task", "train +task.steps=3", "task.steps", "classifier"),
    case("task", "train task=../norm/bn", "task", "no path"),
    case("data", "train data=cifar10 data_root=empty", "cifar10", "data_root"),
    case("data", "train data=cifar100 data_root=empty", "cifar100", "data_root"),
    case("data", "train data=imagefolder data_root=empty", "empty", "train"),
    case("data", "train data=imagenet data_root=nowhere", "nowhere"),
    case("data", "train data.subset=5000", "5000", "at most"),
    case("data", "train data=synthetic data.n=10", "data.n=10", "at least"),
    case("file", "train runs=afile", "afile", "irectory"),
    case("file", "train runs=/proc/normlab", "/proc/normlab"),
    case("file", "train --config-dir nowhere", "nowhere", "not found"),
    case("file", "train --config-dir mine norm=broken", "broken.yaml", "line 2"),
    case("file", "train --config-dir mine norm=empty", "norm", "name"),
    case("file", "train --config-name other", "other"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one finished small run."""
    home = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert cli.main(["train", *SMALL.split()]) == 0
    return home


@pytest.fixture
def there(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], list[str]]:
    """A working directory with what the cases speak of, no network; fills RUN into a line."""
    (run,) = (finished / "runs").iterdir()
    shutil.copytree(run, tmp_path / "runs" / run.name)
    for copy in ("runs/spoilt", "runs/unfinished", f"spoilt_runs/{run.name}"):
        shutil.copytree(run, tmp_path / copy)
    for copy in ("runs/spoilt", f"spoilt_runs/{run.name}"):
        (tmp_path / copy / "checkpoint.pt").write_bytes(b"PK not a checkpoint")
    for copy in ("runs/unfinished", f"spoilt_runs/{run.name}"):
        (tmp_path / copy / "status.json").unlink()
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.yaml").write_text("defaults: [a]\nworld_size: 1\nseed: 0\n")
    (tmp_path / "afile").write_text("not a directory\n")
    (tmp_path / "mine" / "norm").mkdir(parents=True)
    (tmp_path / "mine" / "norm" / "broken.yaml").write_text("name: broken\n  batch: [none\n")
    (tmp_path / "mine" / "norm" / "empty.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NORMLAB_DATA", raising=False)

    def offline(*_: object, **__: object) -> None:
        raise socket.gaierror("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", offline)
    return lambda line: line.replace("RUN", run.name).split()


def content(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else ""
        for path in directory.rglob("*")
    }


def judge(code: int, out: str, err: str, says: tuple[str, ...]) -> None:
    lines = err.splitlines()
    assert code == 2, err
    assert 1 <= len(lines) <= 5, err
    assert lines[0].startswith("normlab: ")
    assert "Traceback" not in out + err
    for part in says:
        assert part in err, err


@pytest.mark.parametrize("bad", CASES, ids=lambda c: f"{c.kind}: {c.line}".replace(" ", "_"))
def test_bad_input_is_refused(
    bad: Case,
    there: Callable[[str], list[str]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    before = content(tmp_path)
    code = cli.main(there(bad.line))
    out, err = capfd.readouterr()
    judge(code, out, err, bad.says)
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- a\n- b\n", "mapping"),
        ("title: [\n", "lab.yaml"),
        ("title: A lab\n", "missing"),
    ],
)
@pytest.mark.parametrize("line", ["sweep lab", "train experiment=lab", "report lab"])
def test_a_malformed_experiment_is_refused(
    line: str,
    text: str,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "lab.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plugins, "experiment_dirs", lambda: [tmp_path])
    code = cli.main(line.split())
    judge(code, *capfd.readouterr(), ("lab", says))
    assert [path.name for path in tmp_path.iterdir()] == ["lab.yaml"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("tran", ("did you mean 'train'",)),
        ("train nbs=abc", ("abc", "integer or null")),
        ("train nbs=48 batch_size=128", ("nbs=48", "batch_size=128")),
        ("train -m nbs=3 seed=0,1 hydra/launcher=joblib", ("nbs=3", "batch_size=128", "2 cells")),
        ("train -m nbs=3 seed=0,1 hydra/launcher=submitit_local", ("nbs=3", "128", "2 cells")),
        ("train -m nbs=2,x hydra/launcher=submitit_local", ("x", "integer or null")),
    ],
)
def test_bad_input_is_refused_by_the_program(
    line: str, says: tuple[str, ...], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "normlab", *line.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    judge(done.returncode, done.stdout, done.stderr, says)
    assert content(tmp_path) == {}


def test_the_table_is_wide_enough() -> None:
    assert len({c.line for c in CASES}) == len(CASES) >= 45
    assert len({c.kind for c in CASES}) >= 12
