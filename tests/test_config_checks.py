"""Values, keys and words that a run's config refuses, by name and in one line."""

import pytest

from normlab import config
from normlab.config import ConfigError, check, compose


def test_all_that_is_offered_passes_the_check() -> None:
    for group in ("norm", "model", "data", "recipe", "scale"):
        for name in config.options(group):
            nbs = ["nbs=32"] if name in ("ghost", "renorm", "virtual") else []
            given = ["init_from=any"] if name == "pretrained" else []
            check(compose([f"{group}={name}", "world_size=1", *nbs, *given]))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("lr=-1", "lr must be a finite number above 0, got lr=-1.0"),
        ("lr=0", "lr=0.0"),
        ("lr=nan", "lr=nan"),
        ("lr=inf", "lr=inf"),
        ("epochs=-1", "epochs must be at least 0 and at most 2147483647, got epochs=-1"),
        ("epochs=0", "epochs=0 trains nothing: init_from=<file> names the weights"),
        ("weights=0123", "weights=0123 says which init_from=<file> has to hold"),
        ("batch_size=0", "batch_size must be at least 1"),
        ("seed=-1", "seed must be at least 0"),
        ("decay=1", "decay must be at least 0 and below 1, got decay=1.0"),
        ("decay=-0.1", "decay=-0.1"),
        ("ema_bank=[0.9,1.5]", "ema_bank=1.5"),
        ("precision=fp8", "precision must be one of fp32, bf16, got precision=fp8"),
        ("remainder=keep", "one of drop, error"),
        ("device=tpu", "one of auto, cpu, cuda"),
        ("skip_done=yes", "skip_done must be one of all, local"),
        ("allocator=own", "one of keep, system"),
        ("threads=0", "threads must be at least 1"),
        ("checkpoint_every=nan", "checkpoint_every must be at least 0 and finite"),
        ("world_size=3", "world_size=3 does not divide"),
        ("world_size=0", "world_size must be at least 1"),
        ("eval_last=99", "eval_last must be at most epochs="),
        ("recipe.schedule=linear", "recipe.schedule must be one of cosine, step, constant"),
        ("recipe.momentum=1", "recipe.momentum"),
        ("recipe.momentum=0", "recipe.nesterov=true needs recipe.momentum above 0"),
        ("recipe.weight_decay=-1", "recipe.weight_decay=-1"),
        ("recipe.warmup=1", "recipe.warmup"),
        ("recipe.milestones=[0.9,0.5]", "recipe.milestones must ascend"),
        ("recipe.milestones=[1.5]", "recipe.milestones=1.5"),
        ("recipe.label_smoothing=1", "recipe.label_smoothing"),
        ("recipe.clip_norm=0", "recipe.clip_norm"),
        ("recipe.lr_batch=0", "recipe.lr_batch"),
        ("domains=[]", "domains=[] must name at least one domain, and none twice"),
        ("domains=[none,none]", "none twice"),
        ("domains=[fog-1]", "domains=[fog-1]: no domain 'fog-1' (domains: none, contrast-1..5"),
        ("domains=[none,tint-1] order=sorted", "several domains go with order=shuffled alone"),
        ("domains=[none,tint-1] batch_size=5", "micro_batch=5 is no multiple of 2 domains"),
        (
            "domains=[none,tint-1,jpeg-1] norm=ghost nbs=2 batch_size=6",
            "nbs=2 is no multiple of 3 domains",
        ),
        ("domains=[none,tint-1] norm=virtual nbs=128", "normalization batches of neighbours"),
        (
            "domains=[none,tint-1] norm=ghost nbs=8 norm.grouping=interleaved",
            "normalization batches of neighbours",
        ),
        ("norm=separate norm.num_domains=2", "the run has domains=[none]: norm.num_domains=1"),
        (
            "norm=separate norm.num_domains=3 domains=[none,tint-1]",
            "norm.num_domains=2, or 1 to share everything",
        ),
        (
            "norm=separate norm.num_domains=2 domains=[none,tint-1] compile=true",
            "norm.num_domains=2 goes with compile=false alone",
        ),
        ("evals=[val:emma]", "val:emma"),
        ("evals=[tset:ema]", "train, val, test"),
        ("evals=[val:ema/decay:0.99]", "ema_bank=[0.99]"),
        ("evals=[val:ema/corrected:true]", "corrected needs /decay:<d>"),
        ("nbs=0", "nbs must be at least 2"),
        ("nbs=-4", "nbs must be at least 2"),
        ("batch_size=99999999999999999999999 nbs=7", "batch_size must be at least 1 and at most"),
        ("seed=99999999999999999999999", "seed must be at least 0 and at most 2147483647"),
        ("epochs=99999999999999999999999", "epochs must be at least 0 and at most 2147483647"),
        ("micro_batch=99999999999999999999999", "micro_batch must be at least 1 and at most"),
        ("model.width=99999999999999999999999", "model.width must be at most 2147483647"),
        ("norm.eps=nan", "norm.eps must be a finite number, got norm.eps=nan"),
        ("norm.eps=inf", "norm.eps must be a finite number"),
        ("+model.stem={scale:[1,-inf]}", "model.stem.scale must be a finite number"),
        ("runs=", "runs must be the path of a directory, got runs=''"),
        ("norm.batch=chunky", "norm.batch must be one of per_rank, ghost"),
        ("order=random", "order must be shuffled, sorted or <labels>x<samples of each>"),
        ("order=3x2", "order=3x2: groups of 6 samples must fill batch_size=128: a multiple of 6"),
        ("order=4x4 nbs=8", "groups of 16 samples must fill nbs=8: a multiple of 16"),
        ("order=4x4 norm=ghost nbs=8", "must fill nbs=8"),
        ("order=2x4 norm=virtual nbs=132 micro_batch=4", "nbs=132 less virtual_extra=128"),
        ("nbs=48", "batch_size=128"),
        ("norm=ghost", "norm=ghost needs nbs"),
        ("norm=gn nbs=8", "norm=gn"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_by_name(overrides: str, said: str) -> None:
    composed = compose(overrides.split())
    with pytest.raises(ConfigError) as refusal:
        check(composed)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_norm_says_how_its_batch_is_formed() -> None:
    composed = compose()
    del composed["norm"]["batch"]
    for ask in (check, config.plan_of):
        with pytest.raises(ConfigError, match=r"norm=bn lacks norm\.batch.*per_rank, ghost"):
            ask(composed)


@pytest.mark.parametrize("override", ["norm=../norm/bn", "+model=./tiny", "scale=bn,../scale/desk"])
def test_an_option_is_a_name_and_no_path(override: str) -> None:
    with pytest.raises(ConfigError, match="and no path, got ") as refusal:
        compose([override])
    assert override in str(refusal.value)


@pytest.mark.parametrize(
    ("override", "written"),
    [
        ("runs=ü ñ/日本", """'runs="ü ñ/日本"'"""),
        ("runs=$(whoami)", """'runs="$(whoami)"'"""),
        ("runs='", """'key="value"'"""),
        ("evals=[val:ema", """'key="value"'"""),
    ],
)
def test_what_hydra_cannot_read_is_named_with_how_to_write_it(override: str, written: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        compose([override])
    assert override in str(refusal.value)
    assert written in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1
    if not written.startswith("'key"):
        assert compose([written.strip("'")])["runs"] == override.removeprefix("runs=")


def test_a_group_is_a_mapping_with_a_name() -> None:
    composed = compose()
    for broken in (None, {}, "bn"):
        with pytest.raises(ConfigError, match="norm must be a mapping with a name"):
            check(composed | {"norm": broken})


def test_wrong_types_and_unknown_keys_are_refused_when_reading_a_recorded_config() -> None:
    from omegaconf import OmegaConf

    recorded = compose(["norm=ghost", "nbs=32"])
    assert config.resolve(OmegaConf.create(recorded)) == recorded
    with pytest.raises(ConfigError, match="nsb"):
        config.resolve(OmegaConf.create(recorded | {"nsb": 4}))
    with pytest.raises(ConfigError, match="epochs takes an integer"):
        config.resolve(OmegaConf.create(recorded | {"epochs": "many"}))
    del recorded["lr"]
    with pytest.raises(ConfigError, match="lr"):
        config.resolve(OmegaConf.create(recorded))
