"""Locals say what they hold: no local of the package bears one of a few vague names."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "pumer"
VAGUE = frozenset(
    (
        "one",
        "own",
        "found",
        "made",
        "known",
        "whole",
        "left",
        "rest",
        "place",
        "number",
        "kind",
        "given",
        "taken",
        "wrong",
        "seen",
        "told",
        "apart",
    )
)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
SCOPES = (*FUNCTIONS, ast.ClassDef)


def parameters(function):
    """All parameters of a function or lambda, as `ast.arg`."""
    a = function.args
    return [
        *a.posonlyargs,
        *a.args,
        *a.kwonlyargs,
        *(arg for arg in (a.vararg, a.kwarg) if arg is not None),
    ]


def is_private(function, inside_function):
    """Whether callers never name the parameters: a lambda, a nested function, a `_name`."""
    if isinstance(function, ast.Lambda) or inside_function:
        return True
    return function.name.startswith("_") and not function.name.endswith("__")


def bound_name(node):
    """The name that this node binds, or None."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return node.id
    if isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)):
        return node.name
    return None


def vague_bindings(scope, inside_function=False, public=frozenset()):
    """`(line, name)` of the vague locals bound in `scope` and in the scopes within it.

    Fields of classes are no locals, and a public parameter may be given another value.
    """
    if isinstance(scope, FUNCTIONS):
        named = {arg.arg for arg in parameters(scope)}
        if is_private(scope, inside_function):
            yield from ((arg.lineno, arg.arg) for arg in parameters(scope) if arg.arg in VAGUE)
            named = frozenset()
        public, inside_function = named, True
        pending = [*scope.body] if isinstance(scope.body, list) else [scope.body]
    else:
        inside_function = inside_function and not isinstance(scope, ast.ClassDef)
        public, pending = frozenset(), [*scope.body]
    while pending:
        node = pending.pop()
        if isinstance(node, SCOPES):
            yield from vague_bindings(node, inside_function)
            if isinstance(node, FUNCTIONS):  # defaults are evaluated outside of the function
                pending += [*node.args.defaults, *filter(None, node.args.kw_defaults)]
            pending += getattr(node, "decorator_list", [])
            continue
        if isinstance(scope, ast.ClassDef) and isinstance(node, (ast.Assign, ast.AnnAssign)):
            pending += filter(None, [node.value])
            continue
        name = bound_name(node)
        if name in VAGUE and name not in public:
            yield node.lineno, name
        pending += ast.iter_child_nodes(node)


def test_locals_say_what_they_hold():
    vague = [
        f"{path.relative_to(PACKAGE.parent)}:{line}: {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for line, name in sorted(vague_bindings(ast.parse(path.read_text(encoding="utf-8"))))
    ]
    assert not vague, "name the value, not its part in the sentence:\n" + "\n".join(vague)


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("def f():\n    found = 1", ["found"]),
        ("def f():\n    a, (own, *rest) = x", ["own", "rest"]),
        ("def f():\n    for number in x: pass", ["number"]),
        ("def f():\n    with x as place: pass", ["place"]),
        ("def f():\n    return (left := 1)", ["left"]),
        ("def f():\n    try: pass\n    except E as wrong: pass", ["wrong"]),
        ("def f(x):\n    match x:\n        case [*seen]: pass", ["seen"]),
        ("X = {kind: 1 for kind in y}", ["kind"]),
        ("X = sorted(y, key=lambda one: one.z)", ["one"]),
        ("def f(x=lambda told: told): pass", ["told"]),
        ("def _f(known, *, taken): pass", ["known", "taken"]),
        ("def f():\n    def g(given): pass", ["given"]),
        ("class A:\n    def _f(self, made):\n        whole = made", ["made", "whole"]),
        ("class A:\n    x: object = [apart for apart in y]", ["apart"]),
        ("def f(kind):\n    kind = kind or 1", []),
        ("class A:\n    kind: str\n    left = 1\n    def __init__(self, kind): pass", []),
        ("def f(x):\n    x.left = x['kind'] = g(place=1)", []),
    ],
)
def test_bindings_are_seen(source, names):
    assert sorted(name for _, name in vague_bindings(ast.parse(source))) == names
