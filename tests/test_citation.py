"""CITATION.cff holds what one must; CHANGELOG.md knows every version of job/versions.py."""

import re
from pathlib import Path

import yaml  # transformers brings it

from job.versions import BFLOAT16, RECORDED, VERSIONS

ROOT = Path(__file__).resolve().parent.parent
# Of the Citation File Format 1.2.0: what a file has to hold, and what else this one may.
REQUIRED = {"cff-version", "message", "title", "authors"}
OPTIONAL = {"abstract", "type", "license", "keywords", "preferred-citation"}
REFERENCE = {"type", "title", "authors", "collection-title", "collection-type", "publisher"}
REFERENCE |= {"volume", "start", "end", "year", "identifiers"}


def test_the_citation_is_one():
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert REQUIRED <= set(found) <= REQUIRED | OPTIONAL
    assert found["cff-version"] == "1.2.0" and found["type"] == "software"
    assert found["title"] == (ROOT / "README.md").read_text(encoding="utf-8").split("\n")[0][2:]
    license_text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert license_text.startswith(f"{found['license']} License")
    assert [author["name"] for author in found["authors"]] == ["The online IPO authors"]
    assert found["authors"][0]["name"] in license_text
    paper = found["preferred-citation"]
    assert {"type", "title", "authors"} <= set(paper) <= REFERENCE
    assert paper["type"] == "conference-paper" and paper["year"] == 2024
    names = [set(author) for author in paper["authors"]]
    assert names == [{"family-names", "given-names"}] * 13
    assert paper["identifiers"][0]["value"] == "arXiv:2403.08635"


def test_the_changelog_knows_every_version():
    """Why each number of job/versions.py was raised stands under the day of its raise."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for name, number in [*VERSIONS.items(), ("recorded", RECORDED), ("bfloat16", BFLOAT16)]:
        for raised in range(2, number + 1):
            assert re.search(rf"`{name}` {raised}\b", text), f"{name} {raised}"
    days = re.findall(r"^## (\d{4}-\d\d-\d\d)", text, re.MULTILINE)
    assert days == sorted(days, reverse=True) and len(days) > 2
