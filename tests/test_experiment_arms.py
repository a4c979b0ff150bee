"""Experiments whose grid has arms: bundles of overrides that stand at places of their own."""

from pathlib import Path

import pytest

from normlab import cli, config, experiment, launch, outcome

ARMS = """
title: Arms
source: a test
set: {epochs: 1}
arms:
  bn-2: {at: {norm: BN, images: 2}, set: {norm: ghost, nbs: 2, norm.affine: true}}
  bn-4: {at: {norm: BN, images: 4}, set: {norm: ghost, nbs: 4}}
  gn: {at: {norm: GN}, set: {norm: gn, norm.groups: null, norm.channels_per_group: 2}}
scales:
  demo:
    axes: {arm: [bn-2, bn-4, gn], lr: [0.1, 0.2], seed: [100, 101]}
    arms: {gn: {lr: 0.3, epochs: 2}}
protocols:
  test: {eval: "test:ema", label: test}
baseline: {images: 2}
table: {columns: [test]}
figure: {kind: curves, x: images, xlabel: images, by: [norm], series: [test]}
published:
  - {label: A paper, at: {norm: BN}, x: images, values: {test: {2: 9.0}}}
claims:
  falls:
    sentence: Falls.
    paper: "9"
    kind: shape
    primary: false
    margin: 0
    monotone: {falls: images, terms: [[1, test, {norm: BN, lr: 0.1}]]}
"""


def load_arms(tmp_path, monkeypatch, *changed):
    text = ARMS
    for old, new in changed:
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "arms.yaml").write_text(text)
    monkeypatch.setattr(experiment, "files", lambda: {"arms": tmp_path / "arms.yaml"})
    experiment.load.cache_clear()
    return experiment.load("arms")


@pytest.fixture(autouse=True)
def forget():
    yield
    experiment.load.cache_clear()


def test_an_arm_is_known_by_its_place_and_made_by_its_overrides(tmp_path, monkeypatch):
    cells = load_arms(tmp_path, monkeypatch).cells("demo")
    assert len(cells) == 12
    assert cells[0].axes == {"arm": "bn-2", "lr": 0.1, "seed": 100}
    assert cells[0].at == {"norm": "BN", "images": 2, "lr": 0.1, "seed": 100}
    assert cells[-1].at == {"norm": "GN", "lr": 0.2, "seed": 101}
    # The axes come after the arms, and a scale's own overrides of an arm before both.
    assert cells[-1].overrides == [
        "scale=demo", "epochs=2", "norm=gn", "norm.groups=null", "norm.channels_per_group=2",
        "lr=0.2", "seed=101",
    ]  # fmt: skip


def test_the_command_for_a_place_names_its_arm(tmp_path, monkeypatch):
    loaded = load_arms(tmp_path, monkeypatch)
    command = loaded.command("demo", [("norm", "GN"), ("lr", 0.2)], [101])
    assert command == "normlab sweep arms scale=demo arm=gn lr=0.2 seed=101"


def test_a_sweep_of_arms_runs_its_cells_in_their_order(tmp_path, monkeypatch):
    loaded = load_arms(tmp_path, monkeypatch)

    def run(composed, _named):
        ran.append(config.cell_key(composed))
        return outcome.Outcome("id", "done", False, Path("runs/id"), {})

    ran: list[str] = []
    monkeypatch.setattr(launch, "run", run)
    assert cli.main(["sweep", "arms", "scale=demo", "seed=100"]) == 0
    wanted = [cell.overrides for cell in loaded.cells("demo") if cell.at["seed"] == 100]
    assert ran == [config.cell_key(config.compose(overrides)) for overrides in wanted]
    assert len(set(ran)) == 6


def test_an_unknown_arm_is_answered_with_the_known_ones(tmp_path, monkeypatch, capfd):
    load_arms(tmp_path, monkeypatch)
    assert cli.main(["sweep", "arms", "scale=demo", "arm=bn-3"]) == 2
    assert "no arm 'bn-3'; did you mean 'bn-" in capfd.readouterr().err
    assert cli.main(["sweep", "nbs", "scale=demo", "arm=bn-2"]) == 2


@pytest.mark.parametrize(
    ("overrides", "instead"),
    [
        ("nbs=4", "nbs themselves .bn-2, bn-4., .*; type arm=bn-4 for those"),
        ("nbs=2,4", "; type arm=bn-2,bn-4 for those"),
        ("+nbs=8", "; type arm=gn [+]nbs=8 to leave"),
        ("nbs=null", "; type arm=gn nbs=null to leave"),
        ("norm=gn", "arms of arms set norm themselves .*; type arm=gn for"),
        ("norm.name=gn", "arms of arms set norm themselves .*; type arm=gn for"),
        ("norm={groups:4}", "set norm.groups themselves .*; type arm=bn-2,bn-4 norm="),
        ("epochs=range(1,4)", r"set epochs .*; type arm=bn-2,bn-4,gn for"),
        ("arm=glob(bn-*) nbs=8", "; type arm=bn-2 nbs=8 for one arm .arms: bn-2, bn-4."),
    ],
)
def test_a_key_in_which_arms_differ_takes_no_value_for_all(
    tmp_path, monkeypatch, overrides, instead
):
    load_arms(tmp_path, monkeypatch)
    with pytest.raises(config.ConfigError, match=instead) as refused:
        config.register(["experiment=arms", "scale=demo", *overrides.split()])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "overrides",
    [
        "arm=bn-2 nbs=8",  # one arm may be varied
        "arm=bn-2 nbs=8,16",
        "arm=bn-2,bn-4 norm=renorm",  # and what arms have in common
        "arm=choice(bn-2,bn-4) norm.affine=false",
        "batch_size=64 norm.eps=1e-3",
        "lr=0.2 seed=100",  # the axis is restricted, though an arm sets it besides
        "eval_last=1 threads=1",  # reaches no weight
    ],
)
def test_what_leaves_arms_apart_may_be_overridden(tmp_path, monkeypatch, overrides):
    same = ("nbs: 2, norm.affine: true", "nbs: 2, norm.affine: false, eval_last: 2")
    load_arms(tmp_path, monkeypatch, same, ("ghost, nbs: 4", "ghost, nbs: 4, norm.affine: false"))
    config.register(["experiment=arms", "scale=demo", *overrides.split()])


def test_the_digest_knows_the_arms_of_its_scale(tmp_path, monkeypatch):
    before = load_arms(tmp_path, monkeypatch).claims_digest("demo")
    again = load_arms(tmp_path, monkeypatch, ("epochs: 2", "epochs: 3"))
    assert again.claims_digest("demo") != before


def test_the_digest_of_a_grid_without_arms_is_what_it_was_before_there_were_any():
    assert experiment.load("nbs").claims_digest("desk") == "4ae94d22"  # recorded by its runs


def test_neighbours_are_compared_within_the_cell_that_a_term_names(tmp_path, monkeypatch):
    loaded = load_arms(tmp_path, monkeypatch)
    (contrast,) = loaded.claims["falls"].contrasts(loaded.scale("demo").places)
    assert contrast.terms == [
        (1, "test", {"images": 2, "norm": "BN", "lr": 0.1}),
        (-1, "test", {"images": 4, "norm": "BN", "lr": 0.1}),
    ]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("[bn-2, bn-4, gn]", "[bn-3]", "scales.demo: unknown arm 'bn-3' .arms: bn-2, bn-4, gn"),
        ("arms: {gn: {lr", "arms: {gm: {lr", "scales.demo: unknown arm 'gm'"),
        ("at: {norm: BN, images: 4}", "at: {norm: BN, images: 2}", "stands where another does"),
        ("at: {norm: GN}", "at: {lr: GN}", "arm gn stands on axes of their own: .'lr'"),
        ("  gn: {at", "  GN: {at", "arms: 'GN' is no name of lower-case"),
        ("set: {norm: ghost, nbs: 4}", "sets: {}", "arms.bn-4: missing keys .'set'"),
        ("by: [norm]", "by: [colour]", "figure.by: 'colour' is an axis of no scale"),
        ("by: [norm]", "only: {colour: red}", "figure.only: 'colour' is an axis of no scale"),
        ("at: {norm: BN}, x", "at: BN, x", r"published\[0\].at: must be a mapping"),
        ("{norm: BN, lr: 0.1}]", "{images: 2}]", "images: 2 names no cell"),
    ],
)
def test_malformed_arms_are_refused(tmp_path, monkeypatch, old, new, says):
    with pytest.raises(ValueError, match=says):
        load_arms(tmp_path, monkeypatch, (old, new))


def test_an_experiment_that_is_gone_is_no_option_any_more(tmp_path, monkeypatch, capfd):
    """Hydra keeps what it was told for as long as the process lives."""
    with monkeypatch.context() as within:
        load_arms(tmp_path, within)
        config.register([])
    experiment.load.cache_clear()
    assert cli.main(["train", "--help"]) == 0
    line = next(line for line in capfd.readouterr().out.splitlines() if "experiment: " in line)
    assert line == f"experiment: {', '.join(sorted(experiment.files()))}"
