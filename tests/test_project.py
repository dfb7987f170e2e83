"""The files around the package: the documentation's configuration and pages."""

import re
from pathlib import Path

import pytest
import yaml

import pumer

ROOT = Path(__file__).parents[1]
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
REFERENCE = "\n".join(
    page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs/reference").glob("*.md"))
)


def pages(entry):
    """The paths of pages in a part of the navigation."""
    if isinstance(entry, str):
        return [entry]
    parts = entry.values() if isinstance(entry, dict) else entry
    return [path for part in parts for path in pages(part)]


def test_the_navigation_has_every_document():
    documents = {path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")}
    assert documents <= {Path(path) for path in pages(SITE["nav"])}


@pytest.mark.parametrize("path", pages(SITE["nav"]))
def test_every_page_of_the_navigation_is_a_file(path):
    assert (ROOT / "docs" / path).is_file() or (ROOT / path).is_file()


@pytest.mark.parametrize("name", sorted({*pumer.__all__} - {"__version__"}))
def test_the_reference_has_every_public_name(name):
    assert re.search(rf"^(::: |    +heading: )pumer\.{name}$", REFERENCE, re.MULTILINE)
