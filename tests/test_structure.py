"""How the package hangs together: which part may import which, how long files get, what an import
costs."""

import ast
import functools
import graphlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"
FILES = sorted((SRC / "pumer").rglob("*.py"))

# Each part may import its own layer and those above it in this list. The name "" is
# pumer/__init__.py.
LAYERS = [
    {
        "_version",
        "_extras",
        "_files",
        "_options",
        "_plugins",
        "_rows",
        "_settings",
        "_shipped",
        "_suggest",
        "_terminal",
        "_yaml",
    },
    {"reducers"},
    {"adapters", "models"},
    {"", "api", "presets", "hub", "costs"},
    {"viz"},
    {"lab.data", "lab.progress"},
    {"lab.tasks", "lab.scenes", "lab.bench"},
    {"lab", "lab.evaluate", "lab.score", "lab.study", "lab.train", "lab.tune"},
    {"__main__", "cli", "lab.commands", "lmms_eval"},
]
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}
FRONT = ("lab", "cli", "__main__", "lmms_eval")
"""The laboratory, and the doors into it."""
MAX_LINES = 400
SYNCS = {"item", "tolist", "nonzero"}  # each makes the host wait for the device


def module_of(path):
    """`(dotted module name, whether it is a package)`."""
    parts = path.relative_to(SRC).with_suffix("").parts
    return (".".join(parts[:-1]), True) if parts[-1] == "__init__" else (".".join(parts), False)


def part_of(module):
    """The part of pumer a dotted name lies in: "pumer.reducers.tome" is in "reducers", rooms of the
    lab are parts."""
    parts = module.split(".")[1:]
    return ".".join(parts[: 2 if parts[:1] == ["lab"] else 1])


def imports(path, tree):
    """`(line, dotted name)` of all that a file imports, wherever in it the import stands.

    Where a name is taken from `pumer` itself it counts as the part of that name if there is one.
    """
    module, is_package = module_of(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = module.split(".")
                up = up[: len(up) - node.level + is_package]
                base = ".".join([*up, *filter(None, [base])])
            if base in ("pumer", "pumer.lab"):
                for alias in node.names:
                    name = f"{base}.{alias.name}"
                    yield node.lineno, name if name.removeprefix("pumer.") in RANK else base
            else:
                yield node.lineno, base
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in {"import_module", "importlib.import_module", "__import__"}
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield node.lineno, node.args[0].value


@functools.cache
def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def trees(*parts):
    """`(path, tree)` of the files in these parts, or of all files."""
    for path in FILES:
        if not parts or part_of(module_of(path)[0]) in parts:
            yield path, parse(path)


def where(path, line, what):
    return f"{path.relative_to(SRC.parent)}:{line}: {what}"


def test_there_are_files_to_check():
    assert FILES


def test_every_part_has_a_layer():
    homeless = {part_of(module_of(path)[0]) for path in FILES} - set(RANK)
    assert not homeless, f"give {sorted(homeless)} a place in LAYERS"


def test_imports_point_one_way():
    wrong = []
    for path, tree in trees():
        part = part_of(module_of(path)[0])
        for line, name in imports(path, tree):
            if name.split(".")[0] == "pumer" and RANK[part_of(name)] > RANK[part]:
                wrong.append(where(path, line, f"{part or 'pumer'} imports {name}"))
    assert not wrong, "\n".join(wrong)


def test_no_imports_go_in_circles():
    """Those for types alone count too, and those inside of functions."""
    modules = {module_of(path)[0] for path in FILES}
    needs = {}
    for path, tree in trees():
        named = needs.setdefault(module_of(path)[0], set())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not node.level:
                whole = {f"{node.module}.{alias.name}" for alias in node.names}
                named |= whole & modules or {node.module} & modules
            elif isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names} & modules
    graphlib.TopologicalSorter(needs).prepare()


def test_any_module_can_be_the_first_that_is_imported():
    """To import a module is to run the packages around it first, whatever those import."""
    modules = {module_of(path)[0] for path in FILES}
    needs = {}
    for path, tree in trees():
        module, is_package = module_of(path)
        around = {module.rsplit(".", n)[0] for n in range(module.count(".") + 1)}
        named = needs.setdefault(module, set())
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and not node.level:
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    name = full if full in modules else node.module
                    named |= {name.rsplit(".", n)[0] for n in range(name.count(".") + 1)}
        needs[module] = (named & modules) - (around if not is_package else around | {module})
    graphlib.TopologicalSorter(needs).prepare()


def test_the_core_does_without_the_lab():
    wrong = [
        where(path, line, f"imports {name}")
        for path, tree in trees()
        for line, name in imports(path, tree)
        if name.startswith("pumer.lab") and not part_of(module_of(path)[0]).startswith(FRONT)
    ]
    assert not wrong, "\n".join(wrong)


def test_reducers_import_only_torch_and_the_standard_library():
    allowed = {"torch", "pumer", *sys.stdlib_module_names}
    wrong = [
        where(path, line, f"imports {name}")
        for path, tree in trees("reducers")
        for line, name in imports(path, tree)
        if name.split(".")[0] not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_no_file_is_too_long():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    wrong = [
        where(path, n, f"over {MAX_LINES} lines") for path, n in lengths.items() if n > MAX_LINES
    ]
    assert not wrong, "\n".join(wrong)


def test_reducers_and_adapters_do_not_print():
    wrong = [
        where(path, node.lineno, "print")
        for path, tree in trees("reducers", "adapters")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert not wrong, "\n".join(wrong)


def test_reducers_never_wait_for_the_device():
    wrong = [
        where(path, node.lineno, node.attr)
        for path, tree in trees("reducers")
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in SYNCS
    ]
    assert not wrong, "\n".join(wrong)


# --- the checks above, on sources that break them: each must be seen ---


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("reducers/tome.py", "def f():\n    from ..api import apply", ["pumer.api"]),
        ("reducers/__init__.py", "from .. import hub", ["pumer.hub"]),
        ("reducers/__init__.py", "from .tome import ToMe", ["pumer.reducers.tome"]),
        ("api.py", "from . import hub, apply", ["pumer.hub", "pumer"]),
        ("viz.py", "from .lab import tasks, render", ["pumer.lab.tasks", "pumer.lab"]),
        ("api.py", "from .reducers import base", ["pumer.reducers"]),
        ("adapters/encoder/vilt.py", "import pumer.cli as c", ["pumer.cli"]),
        ("hub.py", "importlib.import_module('pumer.lab.train')", ["pumer.lab.train"]),
        ("__init__.py", "from .api import apply", ["pumer.api"]),
    ],
)
def test_imports_are_resolved(file, source, expected):
    found = imports(SRC / "pumer" / file, ast.parse(source))
    assert [name for _, name in found] == expected


# --- importing pumer ---

IMPORTED = """
import json, sys, time
import pumer
from pumer.cli import main

def loaded(*names):
    return sorted({*names} & {*sys.modules})

main(["--help"]), main(["--version"]), main(["evall"])
report = {"by help": loaded("torch", "transformers", "jsonargparse", "rich")}

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.vilt import modeling_vilt as vilt
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

def state():
    owners = (torch.nn.functional, torch.nn.Module, PreTrainedModel, vilt, *(
        c for c in vars(vilt).values() if isinstance(c, type) and c.__module__ == vilt.__name__))
    named = {f"{o.__name__}.{k}": id(v) for o in owners for k, v in vars(o).items() if callable(v)}
    for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        named |= {f"{type(registry).__name__}[{k}]": id(registry[k]) for k in registry.keys()}
    return named

before = state()
assert {"torch.nn.functional.scaled_dot_product_attention", "ViltLayer.forward"} <= set(before)
start = time.process_time()
pumer.apply, pumer.load, pumer.report, pumer.ToMe
report["seconds"] = time.process_time() - start
report["by names"] = loaded("transformers.trainer", "matplotlib", "datasets", "jsonargparse")
after = state()
report["changed"] = sorted(
    name for name in before.keys() | after.keys() if before.get(name) != after.get(name))

import pumer.costs.report
report["names"] = pumer.__all__
report["listed"] = dir(pumer)
report["missing"] = [name for name in pumer.__all__ if getattr(pumer, name, None) is None]
report["report"] = callable(pumer.report)
sys.stdout.write("\\n" + json.dumps(report))
"""


@pytest.fixture(scope="module")
def imported():
    """What importing pumer does, step by step, in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED],
        env={**os.environ, "PYTHONPATH": str(SRC)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_help_and_import_leave_heavy_modules_alone(imported):
    assert imported["by help"] == []
    assert imported["by names"] == []


def test_import_changes_nothing_elsewhere(imported):
    assert imported["changed"] == []


def test_names_are_imported_when_they_are_asked_for(imported):
    assert {*imported["names"]} <= {*imported["listed"]}
    assert imported["missing"] == []
    assert imported["report"]


def test_import_is_quick(imported):
    assert imported["seconds"] < 2.0, "pumer adds too much to importing torch and transformers"
