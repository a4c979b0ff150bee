"""Experiment files: what is read from them, and what is refused."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from normlab import experiment, plugins

FILES = sorted(Path(plugins.package_dir("experiments")).glob("*.yaml"))


@pytest.mark.parametrize("name", [path.stem for path in FILES])
def test_every_claim_speaks_of_cells_that_every_scale_runs(name):
    loaded = experiment.load(name)
    assert loaded.claims
    for scale, grid in loaded.scales.items():
        for claim in loaded.claims.values():
            assert claim.contrasts(grid.axes), (scale, claim.name)


@pytest.mark.parametrize("name", [path.stem for path in FILES])
def test_judging_seeds_are_held_apart_and_enough(name):
    for scale, grid in experiment.load(name).scales.items():
        seeds = grid.axes["seed"]
        assert min(seeds) >= 100, scale
        assert len(set(seeds)) == len(seeds)


def test_cells_are_the_product_of_the_axes():
    nbs = experiment.load("nbs")
    cells = nbs.cells("desk")
    assert len(cells) == len(nbs.scales["desk"].axes["nbs"]) * len(nbs.scales["desk"].axes["seed"])
    assert cells[0].overrides == ["scale=desk", "norm=ghost", "nbs=2", "seed=100"]
    assert cells[0].axes == {"nbs": 2, "seed": 100}


def test_a_monotone_claim_compares_neighbours_in_the_direction_it_states():
    claims = experiment.load("nbs").claims
    axes = {"nbs": [8, 2, 4]}
    falls = claims["train_error_falls"].contrasts(axes)
    assert [c.terms for c in falls] == [
        [(1, "train_batch", {"nbs": 2}), (-1, "train_batch", {"nbs": 4})],
        [(1, "train_batch", {"nbs": 4}), (-1, "train_batch", {"nbs": 8})],
    ]
    rises = claims["gap_grows"].contrasts({"nbs": [2, 4]})
    assert rises[0].terms == [
        (-1, "test_batch", {"nbs": 2}),
        (1, "train_batch", {"nbs": 2}),
        (1, "test_batch", {"nbs": 4}),
        (-1, "train_batch", {"nbs": 4}),
    ]


def test_max_is_the_end_of_the_axis():
    claim = experiment.load("nbs").claims["large_nbs_is_worse"]
    (contrast,) = claim.contrasts({"nbs": [2, 32, 64]})
    assert contrast.terms[0] == (1.0, "test_precise", {"nbs": 64})


def test_a_claim_about_a_cell_that_is_not_run_is_refused():
    claim = experiment.load("nbs").claims["bottom_is_flat"]
    with pytest.raises(ValueError, match="nbs=128"):
        claim.contrasts({"nbs": [2, 32]})


def test_the_overlay_is_the_grid():
    node = experiment.overlay("nbs", "demo")
    assert {"override /norm": "ghost"} in node["defaults"]
    assert node["hydra"]["sweeper"]["params"]["nbs"].startswith("2,4,8")
    assert node["evals"] == experiment.load("nbs").evals()
    assert node["experiment"] == "nbs"


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="nbs"):
        experiment.load("nsb")
    with pytest.raises(ValueError, match="demo, desk, gpu, paper"):
        experiment.load("nbs").scale("huge")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"claims.bottom_is_flat.kind": "equal"}, "direction, equivalence, shape"),
        ({"claims.bottom_is_flat.margn": 1}, "margn"),
        ({"claims.bottom_is_flat.monotone": {"falls": "nbs", "terms": []}}, "either"),
        ({"claims.train_error_falls.kind": "direction"}, "exactly one"),
        ({"protocols.test_precise": None, "colour": "red"}, "colour"),
    ],
)
def test_a_malformed_file_is_refused_by_name(tmp_path, monkeypatch, change, says):
    raw = OmegaConf.load(experiment.files()["nbs"])
    for key, value in change.items():
        OmegaConf.update(raw, key, value, force_add=True)
    OmegaConf.save(raw, tmp_path / "broken.yaml")
    monkeypatch.setattr(experiment, "files", lambda: {"broken": tmp_path / "broken.yaml"})
    with pytest.raises(ValueError, match=says):
        experiment.load.__wrapped__("broken")


def test_editing_a_claim_changes_the_digest(tmp_path, monkeypatch):
    raw = OmegaConf.load(experiment.files()["nbs"])
    raw.claims.bottom_is_flat.margin = 5
    OmegaConf.save(raw, tmp_path / "edited.yaml")
    monkeypatch.setattr(experiment, "files", lambda: {"edited": tmp_path / "edited.yaml"})
    edited = experiment.load.__wrapped__("edited")
    assert edited.claims_digest("desk") != experiment.load("nbs").claims_digest("desk")


def test_editing_one_scales_grid_leaves_the_others_declared(tmp_path, monkeypatch):
    raw = OmegaConf.load(experiment.files()["nbs"])
    raw.scales.gpu.axes.seed = [100, 101]
    OmegaConf.save(raw, tmp_path / "edited.yaml")
    monkeypatch.setattr(experiment, "files", lambda: {"edited": tmp_path / "edited.yaml"})
    edited = experiment.load.__wrapped__("edited")
    assert edited.claims_digest("desk") == experiment.load("nbs").claims_digest("desk")
    assert edited.claims_digest("gpu") != experiment.load("nbs").claims_digest("gpu")
