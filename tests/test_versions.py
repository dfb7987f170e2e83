"""What is said of versions in one place agrees with the others."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]


@pytest.mark.parametrize("version", ["3.10", *PYTHONS, "3.15"])
def test_the_package_and_make_take_the_same_pythons(version):
    taken = version in SpecifierSet(PROJECT["requires-python"])
    assert taken == (version in PYTHONS)
    assert taken == (f"Programming Language :: Python :: {version}" in PROJECT["classifiers"])
    check = re.search(
        r"^SUPPORTED := (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE
    )[1]
    major, minor = map(int, version.split("."))
    condition = (
        check.split("sys.exit(not ")[1]
        .removesuffix(")")
        .replace("sys.version_info[:2]", f"({major}, {minor})")
    )
    assert eval(condition) == taken


def test_every_pin_is_a_version_that_the_package_takes():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {
        name.lower(): version
        for name, version in (line.split("==") for line in lines if "==" in line)
    }
    optional = (line for lines in PROJECT["optional-dependencies"].values() for line in lines)
    for requirement in map(Requirement, [*PROJECT["dependencies"], *optional]):
        if requirement.name != "lmms-eval":  # too large for the environment of the tests
            assert pins[requirement.name.lower()] in requirement.specifier
