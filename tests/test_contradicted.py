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
    with (ROOT / "results" / "verdicts.csv").open(newline="") as file:
        found = {
            (row["experiment"], row["claim"]): row["followup"]
            for row in csv.DictReader(file)
            if row["verdict"] == "contradicted"
        }
    assert found
    assert not found.keys() - PARAGRAPHS.keys()
    assert all(found.values())


def test_every_paragraph_is_of_a_claim_and_says_its_follow_up():
    for (name, claim), text in PARAGRAPHS.items():
        declared = experiment.load(name).claims[claim].followup
        (said,) = re.findall(r"\*\*Follow-up:\*\* (.+?)\.\s*\Z", text, re.DOTALL)
        assert " ".join(said.split()).lower() == declared.lower()
