"""The files around the package: the documentation's pages, workflows, forms, scripts."""

import ast
import datetime
import importlib
import re
import tomllib
from pathlib import Path

import pytest
import yaml

import pumer

ROOT = Path(__file__).parents[1]
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
SCRIPTS = sorted((ROOT / "benchmarks/scripts").glob("*.py"))
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
REFERENCE = "\n".join(
    page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs/reference").glob("*.md"))
)


def pages(entry):
    """The paths of pages in a part of the navigation."""
    if isinstance(entry, str):
        return [entry]
    parts = entry.values() if isinstance(entry, dict) else entry
    return [path for part in parts for path in pages(part)]


def test_there_is_something_to_check():
    assert {"docs", "test", "versions"} <= {path.stem for path in WORKFLOWS}
    assert {"latency", "ship", "tune_grid"} <= {path.stem for path in SCRIPTS}
    assert {"bug", "new-model", "new-reducer"} <= {path.stem for path in FORMS}


def test_the_navigation_has_every_document():
    documents = {path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")}
    assert documents <= {Path(path) for path in pages(SITE["nav"])}


@pytest.mark.parametrize("path", pages(SITE["nav"]))
def test_every_page_of_the_navigation_is_a_file(path):
    assert (ROOT / "docs" / path).is_file() or (ROOT / path).is_file()


@pytest.mark.parametrize("name", sorted({*pumer.__all__} - {"__version__"}))
def test_the_reference_has_every_public_name(name):
    assert re.search(rf"^(::: |    +heading: )pumer\.{name}$", REFERENCE, re.MULTILINE)


@pytest.mark.parametrize("path", WORKFLOWS, ids=[path.stem for path in WORKFLOWS])
def test_workflows_run_nothing_but_targets_of_make(path):
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values()
    commands = [step["run"] for job in jobs for step in job["steps"] if "run" in step]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert commands
    assert {*commands} <= {f"make {target}" for target in targets}


def test_the_workflow_of_tests_runs_on_every_python():
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8"))
    pythons = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    prefix = "Programming Language :: Python :: 3."
    classifiers = [line for line in project["classifiers"] if line.startswith(prefix)]
    assert classifiers == [f"{prefix.removesuffix('3.')}{python}" for python in pythons]


def test_the_citation_is_of_this_version_and_of_the_paper_that_the_readme_cites():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == pumer.__version__
    paper = citation["preferred-citation"]
    bibtex = re.search(r"```bibtex\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)[1]
    assert paper["title"].removeprefix("PuMer: ") in bibtex
    people = [f"{who['family-names']}, {who['given-names']}" for who in paper["authors"]]
    assert f"author    = {{{' and '.join(people)}}}" in bibtex
    assert f"{{{paper['start']}--{paper['end']}}}" in bibtex
    assert f"{{{paper['doi']}}}" in bibtex


def test_the_changelog_ends_at_this_version():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## \[(.+?)\](?: - (.*))?$", changelog, re.M)
    assert sections[0] == ("Unreleased", "")
    version, released = sections[1]
    assert version == pumer.__version__
    assert datetime.date.fromisoformat(released)


@pytest.mark.parametrize("path", SCRIPTS, ids=[path.stem for path in SCRIPTS])
def test_benchmark_scripts_import_what_there_is(path):
    """They run for hours on rare occasions: what moves in the package has to be noticed here."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "pumer":
            module = importlib.import_module(node.module)
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


@pytest.mark.parametrize("path", FORMS, ids=[path.stem for path in FORMS])
def test_forms_are_ones_that_github_shows(path):
    """What GitHub asks of a form; it shows none that breaks these rules."""
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    required = {"name", "description", "body"}
    assert required <= form.keys() <= required | {"labels"}
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    for field in fields:
        assert field.keys() <= {"type", "id", "attributes", "validations"}
        assert field["type"] in {"input", "textarea", "dropdown"}
        assert field["attributes"]["label"]
        options = field["attributes"].get("options", ["text"])
        # An unquoted yes or no is a truth value in YAML.
        assert all(isinstance(option, str) for option in options)
        assert ("options" in field["attributes"]) == (field["type"] == "dropdown")
    assert len({field["id"] for field in fields}) == len(fields) > 0
