"""Experiment files: what is read from them, and what is refused."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from normlab import cli, experiment, launch, outcome, plugins

FLAT, FALLS = "claims.bottom_is_flat", "claims.train_error_falls"
FILES = sorted(Path(plugins.package_dir("experiments")).glob("*.yaml"))


@pytest.mark.parametrize("name", [path.stem for path in FILES])
def test_every_claim_speaks_of_cells_that_every_scale_runs(name):
    loaded = experiment.load(name)
    assert loaded.claims
    for scale, grid in loaded.scales.items():
        if grid.given:  # whose cells are the user's
            continue
        for claim in loaded.claims.values():
            assert claim.contrasts(grid.places), (scale, claim.name)


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
    assert node["evals"] == experiment.load("nbs").evals("demo")
    assert node["experiment"] == "nbs"


def test_the_command_for_a_cell_runs_that_cell_and_no_other(monkeypatch):
    nbs = experiment.load("nbs")
    command = nbs.command("demo", [("nbs", 2)], [103, 104])
    assert command == "normlab sweep nbs scale=demo nbs=2 seed=103,104"
    assert (
        nbs.command("demo", [("nbs", 2)], range(100, 110)) == "normlab sweep nbs scale=demo nbs=2"
    )
    assert nbs.command("demo", [("name", "a b")]) == "normlab sweep nbs scale=demo 'name=a b'"

    def run(config, _named):
        ran.append((config["scale"], config["nbs"], config["seed"]))
        return outcome.Outcome("id", "done", False, Path("runs/id"), {})

    ran: list[tuple[str, int, int]] = []
    monkeypatch.setattr(launch, "run", run)
    assert cli.main(command.split()[1:]) == 0
    assert ran == [("demo", 2, 103), ("demo", 2, 104)]


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="nbs"):
        experiment.load("nsb")
    with pytest.raises(ValueError, match="demo, desk, gpu, paper"):
        experiment.load("nbs").scale("huge")


BROKEN = [
    ({"colour": "red"}, "broken.yaml: unknown keys .*colour"),
    ({"title": None}, "title: must be text"),
    ({"set": "norm"}, "set: must be a mapping"),
    ({"scales.desk": {"set": {}}}, "scales.desk: missing keys .*axes"),
    ({"scales.desk.axis": {}}, "scales.desk: unknown keys .*axis.* .allowed: axes, set, arms"),
    ({"scales.desk.axes.nbs": 2}, "scales.desk.axes.nbs: must be a list"),
    ({"scales.desk.axes.nbs": []}, "scales.desk.axes.nbs: has no values"),
    ({"scales.desk.axes.seed": ["one"]}, "scales.desk.axes.seed: .*whole numbers"),
    ({"protocols.test_ema": "test:ema"}, "protocols.test_ema: must be a mapping"),
    ({"protocols.test_ema.eval": "test:emma"}, "protocols.test_ema: .*test:emma.*ema"),
    ({"protocols.test_ema.lable": "x"}, "protocols.test_ema: unknown keys .*lable"),
    ({"baseline.nbs": 3}, "baseline: scale demo does not run nbs=3"),
    ({"baseline.lr": 3}, "baseline: scale demo does not run lr=3"),
    ({"table.rows": "nbs"}, "table: unknown keys .*rows"),
    ({"table.columns": ["val_ema"]}, "table.columns: unknown protocols .*val_ema"),
    ({"figure.series": ["val_ema"]}, "figure.series: unknown protocols .*val_ema"),
    ({"figure.series": []}, "figure.series: names no protocol"),
    ({"figure.kind": "pie"}, "figure.kind: no figure kind 'pie' .*curves"),
    ({"figure.x": "lr"}, "figure.x: 'lr' is no axis of scale demo"),
    ({"figure": {"kind": "curves"}}, "figure: missing keys .*series"),
    ({"published": {"label": "x"}}, "published: must be a list"),
    ({"published": [{"label": "x", "x": "nbs"}]}, r"published\[0\]: missing keys .*values"),
    (
        {"published": [{"label": "x", "x": "nbs", "values": {"test_ema": {2: "low"}}}]},
        r"published\[0\].values.test_ema.2: must be a number, is 'low'",
    ),
    ({f"{FLAT}.kind": "equal"}, "direction, equivalence, shape"),
    ({f"{FLAT}.margn": 1}, f"{FLAT}: unknown keys .*margn"),
    ({f"{FLAT}.margin": -0.1}, f"{FLAT}.margin: must not be below 0"),
    ({f"{FLAT}.margin": "small"}, f"{FLAT}.margin: must be a number"),
    ({f"{FLAT}.primary": "yes"}, f"{FLAT}.primary: must be true or false, is 'yes'"),
    ({f"{FLAT}.paper": 0.5}, f"{FLAT}.paper: must be text"),
    ({f"{FLAT}.contrasts": []}, f"{FLAT}.contrasts: has no contrast"),
    (
        {f"{FLAT}.kind": "direction", f"{FLAT}.contrasts": [[[1, "test_precise", {"nbs": 2}]]] * 2},
        f"{FLAT}: kind direction takes exactly one contrast",
    ),
    ({f"{FLAT}.contrasts": [[]]}, rf"{FLAT}.contrasts\[0\]: has no term"),
    ({f"{FLAT}.contrasts": [[[1, "test_ema"]]]}, rf"{FLAT}.contrasts\[0\]: a term is .factor"),
    ({f"{FLAT}.contrasts": [[[1, "val", {}]]]}, "unknown protocols .*val"),
    ({f"{FLAT}.contrasts": [[[1, "test_ema", {"lr": 1}]]]}, "lr: 1 names no cell"),
    ({f"{FLAT}.monotone": {"falls": "nbs", "terms": []}}, "either contrasts or monotone"),
    ({f"{FALLS}.kind": "direction"}, "exactly one"),
    ({f"{FALLS}.monotone.til": 8}, f"{FALLS}.monotone: unknown keys .*til"),
    ({f"{FALLS}.monotone.rises": "nbs"}, f"{FALLS}.monotone: needs either falls or rises"),
    ({f"{FALLS}.monotone.falls": "lr"}, f"{FALLS}.monotone: 'lr' is no axis"),
    ({f"{FALLS}.monotone.upto": "max"}, f"{FALLS}.monotone.upto: must be a number"),
    ({f"{FALLS}.monotone.terms": [[1]]}, f"{FALLS}.monotone.terms: a term is .factor, protocol"),
]


def load_broken(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "files", lambda: {"broken": tmp_path / "broken.yaml"})
    return experiment.load.__wrapped__("broken")


@pytest.mark.parametrize(("change", "says"), BROKEN, ids=[next(iter(c)) for c, _ in BROKEN])
def test_a_malformed_file_is_refused_by_file_and_key(tmp_path, monkeypatch, change, says):
    raw = OmegaConf.load(experiment.files()["nbs"])
    for key, value in change.items():
        OmegaConf.update(raw, key, value, merge=False, force_add=True)
    OmegaConf.save(raw, tmp_path / "broken.yaml")
    with pytest.raises(ValueError, match=says) as refused:
        load_broken(tmp_path, monkeypatch)
    message = str(refused.value)
    assert message.startswith("experiments/broken.yaml")
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"title: [", "line 1"),
        (b"title: one\ntitle: two", "duplicate key title, line 2"),
        (b"", "missing keys"),
        (b"- title", "must be a mapping"),
        (b"title: \xff\xfe", "broken.yaml"),
        (b"title: ${nothing}", "nothing"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path, monkeypatch, content, says):
    (tmp_path / "broken.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=says) as refused:
        load_broken(tmp_path, monkeypatch)
    assert str(refused.value).startswith("experiments/broken.yaml")
    assert len(str(refused.value).splitlines()) == 1


def test_a_monotone_claim_ends_where_it_says():
    claim = experiment.load("nbs").claims["train_error_falls"]
    (contrast,) = claim.contrasts({"nbs": [256, 512, 1024]})
    assert [cell for _, _, cell in contrast.terms] == [{"nbs": 256}, {"nbs": 512}]


def test_the_kinds_of_figure_are_those_that_can_be_drawn():
    from normlab.report import figures

    assert (
        sorted(path.stem for path in experiment.figure.FIGURES.glob("[!_]*.py")) == figures.names()
    )


def test_the_page_on_experiments_shows_one_that_loads(tmp_path, monkeypatch):
    page = (FILES[0].parent.parent / "docs" / "how-to-add-an-experiment.md").read_text()
    shown = page.split("```yaml\n")[1].split("```")[0]
    (tmp_path / "broken.yaml").write_text(shown)
    loaded = load_broken(tmp_path, monkeypatch)
    assert loaded.table == {"columns": ["test"]}


def test_editing_a_claim_changes_the_digest(tmp_path, monkeypatch):
    nbs = experiment.load("nbs")
    raw = OmegaConf.load(experiment.files()["nbs"])
    raw.claims.bottom_is_flat.margin = 5
    OmegaConf.save(raw, tmp_path / "edited.yaml")
    monkeypatch.setattr(experiment, "files", lambda: {"edited": tmp_path / "edited.yaml"})
    edited = experiment.load.__wrapped__("edited")
    assert edited.claims_digest("desk") != nbs.claims_digest("desk")


def test_editing_one_scales_grid_leaves_the_others_declared(tmp_path, monkeypatch):
    nbs = experiment.load("nbs")
    raw = OmegaConf.load(experiment.files()["nbs"])
    raw.scales.gpu.axes.seed = [100, 101]
    OmegaConf.save(raw, tmp_path / "edited.yaml")
    monkeypatch.setattr(experiment, "files", lambda: {"edited": tmp_path / "edited.yaml"})
    edited = experiment.load.__wrapped__("edited")
    assert edited.claims_digest("desk") == nbs.claims_digest("desk")
    assert edited.claims_digest("gpu") != nbs.claims_digest("gpu")
