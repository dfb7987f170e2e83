"""The examples in the docstrings, as they stand: each one runs and prints what it says."""

import ast
import doctest
import importlib
from pathlib import Path

import pytest
import tiny_llm
import torch

import pumer

SOURCE = Path(pumer.__file__).parent
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
WITHOUT_EXAMPLE = {"__version__"}


def modules_with_examples():
    """Names of our modules that hold an example; the others need not be imported."""
    for file in sorted(SOURCE.rglob("*.py")):
        if ">>> " in file.read_text(encoding="utf-8"):
            name = ".".join(file.relative_to(SOURCE.parent).with_suffix("").parts)
            yield name.removesuffix(".__init__")


def documented(name):
    """The objects of a module whose docstrings hold an example, by qualified name."""
    file = SOURCE.parent / f"{name.replace('.', '/')}.py"
    file = file if file.is_file() else file.with_suffix("") / "__init__.py"
    tree = ast.parse(file.read_text(encoding="utf-8"))

    def walk(node, path):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.ClassDef, ast.FunctionDef)):
                if ">>> " in (ast.get_docstring(child) or ""):
                    yield ".".join([*path, child.name])
                yield from walk(child, [*path, child.name])

    return list(walk(tree, []))


EXAMPLES = [(module, name) for module in modules_with_examples() for name in documented(module)]


@pytest.mark.parametrize(("module", "name"), EXAMPLES, ids=[".".join(pair) for pair in EXAMPLES])
def test_the_example_runs(module, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    owner = importlib.import_module(module)
    documented_object = owner
    for part in name.split("."):
        documented_object = vars(documented_object)[part]
    # Examples see the names of their module, as in `python -m doctest`. In them `llava` stands for
    # any LLaVA, which nobody downloads for a test.
    names = vars(owner) | {"pumer": pumer, "torch": torch, "llava": tiny_llm.model("llava")}
    for wrapper in ("fget", "__func__"):  # properties, static and class methods
        documented_object = getattr(documented_object, wrapper, documented_object)
    docstring = documented_object.__doc__
    example = doctest.DocTestParser().get_doctest(docstring, names, name, module, None)
    report = []
    results = doctest.DocTestRunner(optionflags=FLAGS).run(example, out=report.append)
    assert results.attempted
    assert not results.failed, "".join(report)


def test_every_public_name_has_an_example():
    """What `pumer` exports, classes and functions alike."""
    missing = [
        name
        for name in sorted(set(pumer.__all__) - WITHOUT_EXAMPLE)
        if ">>> " not in (getattr(pumer, name).__doc__ or "")
    ]
    assert not missing, f"give these an example in their docstring: {', '.join(missing)}"
