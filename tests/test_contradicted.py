"""Whatever the committed verdicts contradict has its follow-up, and a paragraph on what differs."""

import csv
import re
from pathlib import Path

from normlab import experiment

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "contradicted.md").read_text()
PARAGRAPHS = {
    (name, claim): text
    for name, claim, text in re.findall(
        r"^## (\w+): (\w+)\n(.+?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL
    )
}


def test_every_contradicted_claim_has_both():
    """One follow-up: where it is contradicted too, the paragraph is what there is to say."""
    found: dict[tuple[str, str], set[str]] = {}
    with (ROOT / "results" / "verdicts.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["verdict"] == "contradicted":
                found.setdefault((row["experiment"], row["claim"]), set()).add(row["scale"])
    assert found
    assert not found.keys() - PARAGRAPHS.keys()
    for (name, claim), scales in found.items():
        assert scales & experiment.load(name).claims[claim].followup.keys(), (name, claim)


def test_every_paragraph_is_of_a_claim_and_says_its_follow_up():
    for (name, claim), text in PARAGRAPHS.items():
        declared = experiment.load(name).claims[claim].followup
        pattern = r"\*\*Follow-up \((.+?)\):\*\* (.+?)\.\s*\Z"
        ((scales, said),) = re.findall(pattern, text, re.DOTALL)
        assert scales.split(", ") == list(declared)
        words = " ".join(said.split()).lower()
        assert {place.lower() for place in declared.values()} == {words}


def test_no_follow_up_is_at_the_scale_that_it_follows():
    """A verdict at `desk` that points to the same claim at `desk` points to itself."""
    for name in experiment.names():
        for claim in experiment.load(name).claims.values():
            for scale, place in claim.followup.items():
                assert f"same claim at `{scale}`" not in place.lower(), (name, claim.name)
