"""Smoke tests with other versions than the pinned ones, each set in an environment of its own.

`make test-versions` runs all of them, `.venv/bin/nox -s oldest` runs one; docs/versions.md has the
results.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import nox
from packaging.requirements import Requirement

PROJECT = nox.project.load_toml("pyproject.toml")["project"]
PINS = dict(
    line.lower().split("==")
    for line in Path("constraints.txt").read_text(encoding="utf-8").splitlines()
    if "==" in line
)
EXTRAS = ("data", "ray", "train", "tune")
"""Between them they bring every optional package but lmms-eval."""
TOOLS = ("pytest", "pytest-xdist", "hypothesis")

nox.options.default_venv_backend = "venv"
nox.options.reuse_venv = "yes"
nox.options.stop_on_first_error = False


def floors() -> dict[str, str]:
    """The lower bound of every dependency of the package and its extras, by its name."""
    optional = PROJECT["optional-dependencies"]
    lines = [*PROJECT["dependencies"], *(line for extra in EXTRAS for line in optional[extra])]
    return {
        requirement.name.lower(): str(requirement.specifier).removeprefix(">=")
        for requirement in map(Requirement, lines)
    }


def smoke(
    session: nox.Session,
    versions: dict[str, str],
    extras: Sequence[str] = EXTRAS,
    options: Iterable[str] = (),
    tests: str = "tests",
) -> None:
    """Install the package under exact versions of some dependencies and run the smoke tests.

    torch goes first, alone and by exact version: whichever build the index offers is kept by what
    follows.
    """
    constraints = Path(session.virtualenv.location) / "constraints.txt"
    constraints.write_text(
        "".join(f"{name}=={version}\n" for name, version in versions.items()), encoding="utf-8"
    )
    session.install(f"torch=={versions['torch']}")
    session.install(
        "-c",
        str(constraints),
        *options,
        "-e",
        "." + (f"[{','.join(extras)}]" if extras else ""),
        *TOOLS,
    )
    session.run("python", "-m", "pip", "list", "--format", "freeze", "--exclude-editable")
    session.run("pytest", "-m", "smoke", tests, *session.posargs)


@nox.session(name="oldest-transformers")
def oldest_transformers(session: nox.Session) -> None:
    """The oldest transformers that pyproject.toml allows, and everything else as pinned."""
    brought_along = ("transformers", "huggingface_hub", "tokenizers", "safetensors")
    pins = {name: version for name, version in PINS.items() if name not in brought_along}
    smoke(session, pins | {"transformers": floors()["transformers"]})


@nox.session
def newest(session: nox.Session) -> None:
    """The newest of everything but torch, pinned or not."""
    smoke(session, {"torch": PINS["torch"]}, options=("--upgrade", "--upgrade-strategy", "eager"))


@nox.session
def oldest(session: nox.Session) -> None:
    """The oldest of all that pyproject.toml allows; transformers and tools of testing as pinned."""
    pinned = {name: PINS[name] for name in ("transformers", *TOOLS)}
    smoke(session, floors() | pinned)


@nox.session(name="no-extras")
def no_extras(session: nox.Session) -> None:
    """As pinned, without any extra: the tests of an extra are left out."""
    smoke(session, PINS, extras=(), tests="tests/test_smoke.py")
