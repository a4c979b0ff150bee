"""Composition and identity of a run's config; what it refuses is in test_config_checks."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from normlab import config, experiment
from normlab.config import (
    Config,
    ConfigError,
    cell_key,
    compose,
    identity,
    run_id,
    training_config,
)
from normlab.plugins import package_dir

CONF = package_dir("conf")


# What the ids below were made with, so that tuning a scale does not touch them.
BASE = ["model=tiny", "data=digits", "recipe=cosine", "batch_size=128", "epochs=5", "lr=0.1"]


def known_as(*overrides: str) -> str:
    base = [] if any(word.startswith("scale=") for word in overrides) else BASE
    composed = compose([*base, *overrides])
    return run_id(composed, device="cpu", data_digest="0123abcd", kernels=False)


# -- composition ----------------------------------------------------------------------------------


def test_importing_config_does_not_import_torch() -> None:
    code = "import sys, normlab.config as c; c.compose(['norm=gn']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_every_key_of_the_schema_has_its_default_and_a_comment_in_config_yaml() -> None:
    text = (CONF / "config.yaml").read_text()
    given = set(yaml.safe_load(text)) - {"defaults", "hydra"}
    groups = {"norm", "conv", "model", "data", "task", "recipe"}
    assert given == set(Config.__annotations__) - groups
    for key in given:
        (line,) = (line for line in text.splitlines() if line.startswith(f"{key}:"))
        assert " # " in line, f"{key} has no comment"


@pytest.mark.parametrize("group", ["norm", "conv", "model", "data", "recipe", "scale"])
def test_every_option_composes_and_is_called_like_its_file(group: str) -> None:
    for name in config.options(group):
        composed = compose([f"{group}={name}"])
        assert (composed["scale"] if group == "scale" else composed[group]["name"]) == name


def test_a_config_is_plain_and_holds_no_environment_look_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NORMLAB_DATA", "/some/where")
    composed = compose(["norm=ghost", "nbs=32"])
    assert composed["data_root"] == "/some/where"
    assert "${" not in str(composed)
    assert yaml.safe_load(yaml.safe_dump(composed)) == composed


def test_an_override_beats_the_experiment_which_beats_the_scale() -> None:
    desk = compose(["scale=desk"])
    assert (desk["norm"]["name"], desk["model"]["name"]) == ("bn", "resnet8")
    both = compose(["scale=desk", "experiment=nbs"])
    assert (both["norm"]["name"], both["model"]["name"]) == ("ghost", "resnet8")
    assert both["experiment"] == "nbs"
    assert "test:precise" in both["evals"]
    mine = compose(["scale=desk", "experiment=nbs", "norm=bn", "model=tiny", "epochs=3"])
    assert (mine["norm"]["name"], mine["model"]["name"], mine["epochs"]) == ("bn", "tiny", 3)


def test_the_desk_scale_is_protocol_d16() -> None:
    desk = compose(["scale=desk"])
    assert (
        desk["data"] | {"name": "cifar10", "size": 16, "subset": 10000, "augment": "none"}
        == (desk["data"])
    )
    assert (desk["model"]["depth"], desk["model"]["width"], desk["model"]["stages"]) == (8, 16, 3)
    assert (desk["batch_size"], desk["epochs"], desk["lr"]) == (128, 10, 0.1)
    assert (desk["precision"], desk["channels_last"]) == ("fp32", False)
    recipe = desk["recipe"]
    assert (recipe["schedule"], recipe["warmup"], recipe["lr_batch"]) == ("cosine", 0.05, None)
    assert (recipe["nesterov"], recipe["momentum"], recipe["weight_decay"]) == (True, 0.9, 5e-4)
    assert not recipe["decay_norm"]
    assert not recipe["decay_bias"]


def test_the_paper_scale_is_the_papers_protocol() -> None:
    paper = compose(["scale=paper"])
    recipe = paper["recipe"]
    assert (paper["model"]["name"], paper["model"]["zero_init_last"]) == ("resnet50", True)
    assert (paper["batch_size"], paper["world_size"], paper["epochs"]) == (1024, 8, 100)
    assert (paper["lr"], recipe["lr_batch"], recipe["gamma"]) == (0.1, 256, 0.1)
    assert [m * paper["epochs"] for m in recipe["milestones"]] == pytest.approx([30, 60, 90])
    assert recipe["warmup"] * paper["epochs"] == 5
    assert (recipe["weight_decay"], recipe["decay_norm"], recipe["decay_bias"]) == (
        1e-4,
        True,
        True,
    )
    assert paper["eval_last"] == 5


@pytest.mark.parametrize("scale", sorted(config.options("scale")))
def test_scales_and_groups_have_a_first_line_that_says_what_they_are(scale: str) -> None:
    lines = config.options("scale")[scale].read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert lines[1].startswith("# ")


def test_our_options_come_before_those_of_installed_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from normlab import plugins

    other = tmp_path / "conf"
    (other / "norm").mkdir(parents=True)
    (other / "norm" / "ghost.yaml").write_text("name: ghost\nbatch: none\n")
    (other / "norm" / "extra.yaml").write_text("name: extra\nbatch: per_rank\nsharpness: 2\n")
    monkeypatch.setattr(plugins, "conf_dirs", lambda: [CONF, other])
    assert config.options("norm")["ghost"].parent == CONF / "norm"
    assert compose(["norm=ghost", "nbs=8"])["norm"]["batch"] == "ghost"
    assert compose(["norm=extra", "norm.sharpness=3"])["norm"]["sharpness"] == 3


# -- identity -------------------------------------------------------------------------------------

# Run directories, committed results and the report find runs by these ids. If this test fails, a
# change has orphaned every run made before it, as far as this list can see. A new key belongs into
# `identity.LATER` with its default, a renamed one keeps its place in the hash; only where the old
# numbers must not be found again may the list be renewed, together with SCHEMA_VERSION.
FROZEN = {
    "": "tiny-bn-nbs128-s0-034b2348",
    "norm=ghost nbs=32": "tiny-ghost-nbs32-s0-5efbb2ae",
    "norm=ghost nbs=32 seed=7": "tiny-ghost-nbs32-s7-4b40ce6c",
    "norm=ghost nbs=32 decay=0.99": "tiny-ghost-nbs32-s0-6f38347f",
    "norm=gn": "tiny-gn-s0-be5d8199",
    "norm=ln": "tiny-ln-s0-31a39aa3",
    "norm=in": "tiny-in-s0-1d6d9111",
    "norm=none": "tiny-none-s0-87f21ca9",
    "nbs=16": "tiny-bn-nbs16-s0-ef76cb72",
    "recipe=step epochs=20 lr=0.05": "tiny-bn-nbs128-s0-1f5f92a2",
    "precision=bf16 channels_last=true": "tiny-bn-nbs128-s0-8df69242",
    "scale=desk norm=ghost nbs=2 seed=100": "resnet8-ghost-nbs2-s100-8d65d39f",
    "scale=desk model=resnet20 data.size=32": "resnet20-bn-nbs128-s0-b39ac838",
    "scale=gpu norm=ghost nbs=1024": "resnet20-ghost-nbs1024-s0-ce4596a8",
    "scale=paper norm=gn norm.groups=32": "resnet50-gn-s0-1ae00bd9",
}


@pytest.mark.parametrize("overrides", FROZEN)
def test_ids_are_frozen(overrides: str) -> None:
    assert known_as(*overrides.split()) == FROZEN[overrides]


@pytest.mark.parametrize(
    "overrides",
    [
        "evals=[test:ema]", "eval_last=3", "ema_bank=[0.5,0.99]", "runs=elsewhere",
        "data_root=/data", "skip_done=local", "checkpoint_every=1", "allocator=system",
        "device=cpu", "threads=1", "remainder=error",
        # the resolved plan is what counts, however much of it was spelt out
        "nbs=128", "micro_batch=128", "nbs=128 micro_batch=128",
        # what an option is called does not matter, only what it is
        "recipe.name=mine", "model.name=mine +model.module=tiny",
    ],
)  # fmt: skip
def test_what_does_not_reach_the_weights_does_not_change_the_hash(overrides: str) -> None:
    assert known_as(*overrides.split())[-8:] == known_as()[-8:]


@pytest.mark.parametrize(
    "overrides",
    [
        "seed=1", "nbs=64", "batch_size=64", "epochs=6", "lr=0.2", "decay=0.99", "precision=bf16",
        "channels_last=true", "compile=true", "compile=graphs", "recipe.nesterov=false",
        "recipe.clip_norm=1",
        "order=sorted", "order=4x2",
        "model.width=8", "data.subset=500", "norm.eps=1e-3", "norm=ghost nbs=128",
        "norm=ghost nbs=128 micro_batch=128 norm.population=pooled",
    ],
)  # fmt: skip
def test_what_reaches_the_weights_changes_the_hash(overrides: str) -> None:
    assert known_as(*overrides.split())[-8:] != known_as()[-8:]


def test_device_data_and_kernels_are_part_of_the_identity() -> None:
    composed = compose()
    ids = {
        run_id(composed, device=device, data_digest=digest, kernels=kernels)
        for device in ("cpu", "cuda")
        for digest in ("aa", "bb")
        for kernels in (False, True)
    }
    assert len(ids) == 8


def test_the_choices_of_a_batch_norm_change_the_id_where_they_are_made() -> None:
    """They came later: an id from before them stays."""
    assert known_as("norm.statistics=null", "norm.update=null") == known_as()
    made = [known_as("norm.statistics=population"), known_as("norm.update=false")]
    assert len({each[-8:] for each in (*made, known_as())}) == 3


def test_a_cumulative_average_has_no_decay() -> None:
    """P5: it is an option of norm=bn, which changes the id; what it does not use changes none."""
    mine = known_as("norm.cumulative=true")
    assert mine[-8:] != known_as()[-8:]
    assert known_as("norm.cumulative=true", "decay=0.5") == mine
    with pytest.raises(ConfigError, match=r"norm\.cumulative"):
        compose(["norm=ghost", "nbs=2", "norm.cumulative=true"])


def test_the_order_is_in_the_name_of_a_run_unless_it_is_the_usual_one() -> None:
    assert known_as("norm=ghost", "nbs=32", "order=4x2").startswith("tiny-ghost-nbs32-4x2-s0-")
    assert known_as("norm=gn", "order=sorted").startswith("tiny-gn-sorted-s0-")
    assert known_as("norm=gn", "order=shuffled") == known_as("norm=gn")
    old = {key: value for key, value in compose(["norm=gn"]).items() if key != "order"}
    assert identity.with_later_keys(old)["order"] == "shuffled"


def test_recorded_configs_are_completed_outside_the_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group's new option would be refused by its other members, which do not have it."""
    monkeypatch.setitem(identity.LATER, "grace", 5)
    recorded = compose(["norm=gn"])
    assert identity.with_later_keys(recorded) == recorded | {"grace": 5}


def test_workers_of_a_loader_are_not_part_of_the_identity() -> None:
    assert known_as("data=imagefolder") == known_as("data=imagefolder", "data.workers=2")


def test_an_experiments_runs_are_anybodys_runs() -> None:
    mine = known_as("scale=desk", "norm=ghost", "nbs=4", "seed=100")
    assert known_as("scale=desk", "experiment=nbs", "nbs=4", "seed=100") == mine


@pytest.mark.parametrize("norm", ["gn", "ln", "in", "none"])
def test_a_norm_that_sees_no_other_sample_has_neither_nbs_nor_decay(norm: str) -> None:
    kept = training_config(compose([f"norm={norm}"]))
    assert not {"nbs", "decay"} & set(kept)
    assert "nbs" not in known_as(f"norm={norm}")
    assert known_as(f"norm={norm}", "decay=0.5") == known_as(f"norm={norm}")


def test_runs_of_a_cell_differ_in_nothing_but_the_seed() -> None:
    assert cell_key(compose(["seed=3"])) == cell_key(compose(["seed=4"]))
    assert cell_key(compose(["lr=0.2"])) != cell_key(compose())


@pytest.mark.parametrize("key", ["grace", "recipe.grace", "norm.grace", "model.grace"])
def test_a_key_introduced_later_counts_only_where_it_is_not_its_default(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_grace(value: int) -> dict:
        changed = compose(BASE)
        node = changed
        *parents, last = key.split(".")
        for parent in parents:
            node = node[parent]
        node[last] = value
        return changed

    def known(composed: dict) -> str:
        return run_id(composed, device="cpu", data_digest="0123abcd", kernels=False)

    assert known(with_grace(5)) != known_as()  # as it would be without a word in LATER
    monkeypatch.setitem(identity.LATER, key, 5)
    assert known(with_grace(5)) == known_as()
    assert cell_key(with_grace(5)) == cell_key(compose(BASE))
    assert known(with_grace(6)) != known_as()
    assert known_as() == known(compose(BASE))  # and a config from before the key is found again


@pytest.mark.parametrize("name", ["ema_decay", "norms"])
def test_cells_composed_together_are_those_composed_alone(name):
    """Arms of several groups, lists, nulls and dotted keys; about two seconds."""
    cells = [cell.overrides for cell in experiment.load(name).cells("demo")]
    jobs = list({tuple(word for word in cell if "seed=" not in word) for cell in cells})[:6]
    assert config.compose_each(jobs) == [config.compose(job) for job in jobs]


@pytest.mark.parametrize(
    ("override", "says"),
    [("epoch=3", "no key 'epoch'; did you mean 'epochs'"), ("norm.grops=2", "no key 'norm.grops'"),
     ("epochs=many", "epochs takes an integer")],
)  # fmt: skip
def test_cells_composed_together_are_refused_as_alone(override, says):
    with pytest.raises(config.ConfigError, match=says):
        config.compose_each([["scale=demo", "norm=gn", override]])
