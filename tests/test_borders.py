"""The borders of CONTRIBUTING.md: a rule reads syntax trees and names each crossing; a planted one proves that it can.

`KNOWN` holds crossings that still stand. It may only shrink: a row that no longer happens fails the test too.
"""

from __future__ import annotations

import ast
import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("infimed_jax", "data_prep", "launch")
MOST_LINES, MOST_PARAMETERS = 400, 8

Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


class Source(NamedTuple):
    """One file: its path from the root, its lines and its syntax tree."""

    path: str
    lines: int
    tree: ast.Module

    @property
    def folder(self) -> str:
        return str(PurePosixPath(self.path).parent)

    @property
    def module(self) -> str:
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@functools.cache
def read(root: Path) -> tuple[Source, ...]:
    """All Python files of the packages and of benchmarks/ under `root`."""
    files = sorted(file for folder in (*PACKAGES, "benchmarks") for file in (root / folder).rglob("*.py"))
    texts = ((file.relative_to(root).as_posix(), file.read_text(encoding="utf-8")) for file in files)
    return tuple(Source(path, len(text.splitlines()), ast.parse(text)) for path, text in texts)


# ------------------------------------------------------------------------------------------------ imports


def imports(source: Source) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(module, names taken from it) of each import, those in functions and under TYPE_CHECKING included."""
    for node in ast.walk(source.tree):
        match node:
            case ast.Import(names=aliases):
                yield from ((alias.name, ()) for alias in aliases)
            case ast.ImportFrom(module=module, names=aliases, level=level):
                start = source.folder.split("/")[: len(source.folder.split("/")) - level + 1] if level else []
                yield ".".join([*start, *([module] if module else [])]), tuple(alias.name for alias in aliases)
            case ast.Call(func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__")):
                match node.args:
                    case [ast.Constant(value=str(module)), *_]:
                        yield module, ()


def _inside(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.")


def flax_outside_of_models(sources: Iterable[Source]) -> set[str]:
    return {
        source.path
        for source in sources
        if not source.path.startswith("infimed_jax/models/")
        and any(_inside(module, "flax") for module, _ in imports(source))
    }


def imports_of_an_upper_layer(sources: Iterable[Source]) -> set[str]:
    above = {"infimed_jax": ("data_prep", "launch"), "data_prep": ("launch",)}
    return {
        f"{source.path} imports {module}"
        for source in sources
        for module, _ in imports(source)
        if any(_inside(module, upper) for upper in above.get(source.path.split("/")[0], ()))
    }


def file_graph(sources: Iterable[Source]) -> dict[str, set[str]]:
    """Path to the paths that it imports.

    `from package import name` is an edge to the module of that name where there is one, else to the package's file.
    That Python also runs the files of the packages around a module is no edge.
    """
    sources = tuple(sources)
    paths = {source.module: source.path for source in sources}
    graph: dict[str, set[str]] = {}
    for source in sources:
        targets = set()
        for module, names in imports(source):
            targets |= {paths.get(f"{module}.{name}", paths.get(module)) for name in names} or {paths.get(module)}
        graph[source.path] = {target for target in targets if target} - {source.path}
    return graph


def circles(graph: Mapping[str, set[str]]) -> set[str]:
    """The strongly connected components of two nodes or more, each as one line."""
    reach = {node: _reachable(graph, node) for node in graph}
    groups = {frozenset(other for other in reach[node] if node in reach[other]) | {node} for node in graph}
    return {" <-> ".join(sorted(group)) for group in groups if len(group) > 1}


def _reachable(graph: Mapping[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        fresh = graph.get(waiting.pop(), set()) - seen
        seen |= fresh
        waiting += fresh
    return seen


def circles_of_files(sources: Iterable[Source]) -> set[str]:
    return circles(file_graph(sources))


def circles_of_folders(sources: Iterable[Source]) -> set[str]:
    """A folder is its own files, without those of the folders in it."""
    graph: dict[str, set[str]] = defaultdict(set)
    for path, targets in file_graph(sources).items():
        folder = str(PurePosixPath(path).parent)
        graph[folder] |= {str(PurePosixPath(target).parent) for target in targets} - {folder}
    return circles(graph)


# ------------------------------------------------------------------------------------------------ functions


def functions(source: Source) -> Iterator[tuple[str, Function, bool]]:
    """(name with its path, function, whether its first parameter is the instance or class)."""

    def below(node: ast.AST, name: str, in_class: bool) -> Iterator[tuple[str, Function, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Lambda):
                yield f"{name}.lambda", child, False
                yield from below(child, name, False)
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in child.decorator_list)
                yield f"{name}.{child.name}", child, in_class and not static
                yield from below(child, f"{name}.{child.name}", False)
            elif isinstance(child, ast.ClassDef):
                yield from below(child, f"{name}.{child.name}", True)
            else:
                yield from below(child, name, in_class)

    for name, function, bound in below(source.tree, "", False):
        yield f"{source.path}:{name.removeprefix('.')}", function, bound


def many_parameters(sources: Iterable[Source]) -> set[str]:
    return {
        name
        for source in sources
        for name, function, bound in functions(source)
        if _parameters(function.args) - bound > MOST_PARAMETERS
    }


def _parameters(args: ast.arguments) -> int:
    stars = (args.vararg is not None) + (args.kwarg is not None)
    return len(args.posonlyargs) + len(args.args) + len(args.kwonlyargs) + stars


def keywords_handed_through(sources: Iterable[Source]) -> set[str]:
    """Functions that take `**kwargs` and give them, or something made of them, to a call as `**`."""
    return {
        name
        for source in sources
        for name, function, _ in functions(source)
        if function.args.kwarg is not None and _unpacks(function, function.args.kwarg.arg)
    }


def _unpacks(function: Function, name: str) -> bool:
    stars = (
        keyword.value
        for call in ast.walk(function)
        if isinstance(call, ast.Call)
        for keyword in call.keywords
        if keyword.arg is None
    )
    return any(isinstance(part, ast.Name) and part.id == name for star in stars for part in ast.walk(star))


def bundles_of_one_call(sources: Iterable[Source]) -> set[str]:
    """Classes of fields alone that are made in one place, taken by one function, and mentioned nowhere else.

    Such an object has no meaning but to be fewer parameters. Classes that share a name count as one.
    """
    sources = tuple(sources)
    mentions, made, taken = (defaultdict[str, int](int) for _ in range(3))
    for source in sources:
        for node in ast.walk(source.tree):
            match node:
                case ast.Name(id=name) | ast.Attribute(attr=name):
                    mentions[name] += 1
                case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)):
                    made[name] += 1
                case ast.arg(annotation=ast.Name(id=name) | ast.Attribute(attr=name)):
                    taken[name] += 1
    return {
        f"{source.path}:{node.name}"
        for source in sources
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ClassDef)
        and not any(isinstance(part, ast.FunctionDef) for part in node.body)
        and (made[node.name], taken[node.name], mentions[node.name]) == (1, 1, 2)
    }


# ------------------------------------------------------------------------------------------------ lines, products


def long_files(sources: Iterable[Source]) -> set[str]:
    return {source.path for source in sources if source.lines > MOST_LINES}


_EINSUM_ROOMS = tuple(f"infimed_jax/{room}/" for room in ("models", "ops", "sampling", "rl", "train"))
_PRODUCTS = {"dot", "dot_general", "matmul", "tensordot", "vdot", "vecdot"}


def products_without_letters(sources: Iterable[Source]) -> set[str]:
    """`FILE: FUNCTION` of each matrix product that is no einsum, in the rooms of the model's arithmetic."""
    return {
        f"{source.path}: {product}"
        for source in sources
        if source.path.startswith(_EINSUM_ROOMS)
        for node in ast.walk(source.tree)
        for product in _products(node)
    }


def _products(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.BinOp(op=ast.MatMult()) | ast.AugAssign(op=ast.MatMult()):
            yield "@"
        case ast.Attribute(attr=name) if name in _PRODUCTS:
            yield name
        case ast.ImportFrom(names=aliases):
            yield from (alias.name for alias in aliases if alias.name in _PRODUCTS)


# ------------------------------------------------------------------------------------------------ the tests

RULES: dict[str, Callable[[Iterable[Source]], set[str]]] = {
    rule.__name__: rule
    for rule in (
        flax_outside_of_models,
        imports_of_an_upper_layer,
        circles_of_files,
        circles_of_folders,
        many_parameters,
        keywords_handed_through,
        bundles_of_one_call,
        long_files,
        products_without_letters,
    )
}

KNOWN: dict[str, set[str]] = {}


@pytest.mark.parametrize("name", RULES)
def test_no_border_is_crossed(name):
    crossings, known = RULES[name](read(ROOT)), KNOWN.get(name, set())
    assert not (new := sorted(crossings - known)), f"{name}: {new} cross a border of CONTRIBUTING.md"
    assert not (gone := sorted(known - crossings)), f"{name}: delete {gone} from KNOWN, so that they stay fixed"


def test_every_known_crossing_has_a_rule():
    assert KNOWN.keys() <= RULES.keys()


def test_every_package_is_read():
    """A rule that reads no file reports nothing."""
    paths = {source.path for source in read(ROOT)}
    for file in ("infimed_jax/models/layers.py", "data_prep/sources/vqa_rad.py", "launch/run.py", "benchmarks/data.py"):
        assert file in paths


IN_MODELS, IN_OPS, PREP, LAUNCH = "infimed_jax/models/x.py", "infimed_jax/ops/x.py", "data_prep/x.py", "launch/x.py"
NINE = "a, b, c, d, e, f, g, h, i"
PLANTED = [
    ("flax_outside_of_models", {IN_OPS: "import flax"}, {IN_OPS}),
    ("flax_outside_of_models", {IN_OPS: "def f():\n    from flax.linen import Module"}, {IN_OPS}),
    ("flax_outside_of_models", {LAUNCH: "import importlib\nimportlib.import_module('flax.linen')"}, {LAUNCH}),
    ("flax_outside_of_models", {IN_MODELS: "import flax.linen as nn", IN_OPS: "import flaxen"}, set()),
    ("imports_of_an_upper_layer", {IN_OPS: "import data_prep.y"}, {f"{IN_OPS} imports data_prep.y"}),
    ("imports_of_an_upper_layer", {IN_OPS: "def f():\n    import launch"}, {f"{IN_OPS} imports launch"}),
    (
        "imports_of_an_upper_layer",
        {PREP: "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from launch import y"},
        {f"{PREP} imports launch"},
    ),
    ("imports_of_an_upper_layer", {PREP: "import infimed_jax", LAUNCH: "import data_prep, infimed_jax"}, set()),
    (
        "circles_of_files",
        {
            "launch/a.py": "from launch import b",
            "launch/b.py": "def f():\n    import launch.c",
            "launch/c.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .a import A",
            "launch/d.py": "from launch import a",
        },
        {"launch/a.py <-> launch/b.py <-> launch/c.py"},
    ),
    (
        "circles_of_files",
        {"launch/p/__init__.py": "from launch.p.b import B", "launch/p/b.py": "from launch.p import C"},
        {"launch/p/__init__.py <-> launch/p/b.py"},
    ),
    (
        "circles_of_files",
        {"launch/p/__init__.py": "from . import b", "launch/p/b.py": "from launch.p import c", "launch/p/c.py": ""},
        set(),
    ),
    (
        "circles_of_folders",
        {
            "launch/p/a.py": "import launch.q.a",
            "launch/q/a.py": "",
            "launch/q/b.py": "from launch.r.a import A",
            "launch/r/a.py": "def f():\n    from ..p import b",
            "launch/p/b.py": "",
        },
        {"launch/p <-> launch/q <-> launch/r"},
    ),
    ("circles_of_folders", {"launch/a.py": "import launch.p.a", "launch/p/a.py": "import launch.p.b"}, set()),
    (
        "many_parameters",
        {
            PREP: f"class A:\n    def m(self, {NINE}): ...\n    @staticmethod\n    def s({NINE}): ...\n"
            f"    def ok(self, a, b, c, d, e, f, g, h): ...\ndef f(a, b, c, d, /, e, f, g, *h, **i): ...\n"
            f"def outer():\n    async def inner(a, *, b, c, d, e, f, g, h, i): ...\n    return lambda {NINE}: a\n"
        },
        {f"{PREP}:{name}" for name in ("A.m", "A.s", "f", "outer.inner", "outer.lambda")},
    ),
    (
        "keywords_handed_through",
        {
            PREP: "def f(**k):\n    return g(1, **k)\n"
            "class A:\n    def m(self, **k):\n        return g(**(D | dict(k)))\n"
            "def names(**k):\n    return sorted(k)\ndef own():\n    k = {}\n    return g(**k)\n"
        },
        {f"{PREP}:f", f"{PREP}:A.m"},
    ),
    (
        "bundles_of_one_call",
        {
            PREP: "class Bundle(NamedTuple):\n    a: int\ndef f(bundle: Bundle): ...\n"
            "class Result:\n    a: int\ndef g() -> Result: ...\ndef h(x: Result): ...\n"
            "class Machine:\n    a: int\n    def run(self): ...\ndef run(machine: Machine): ...\n",
            LAUNCH: "import data_prep.x\ndata_prep.x.f(data_prep.x.Bundle(1))\ndata_prep.x.h(data_prep.x.Result(1))\n"
            "data_prep.x.run(data_prep.x.Machine(1))\n",
        },
        {f"{PREP}:Bundle"},
    ),
    ("long_files", {PREP: "\n" * 401, LAUNCH: "\n" * 400}, {PREP}),
    (
        "products_without_letters",
        {
            IN_OPS: "y = a @ b\ny @= c\njnp.dot(a, b)\nfrom jax.lax import dot_general as d\nx.matmul(y)\n"
            "jnp.einsum('td,df->tf', a, b)\n",
            PREP: "y = a @ b",
        },
        {f"{IN_OPS}: {product}" for product in ("@", "dot", "dot_general", "matmul")},
    ),
]


@pytest.mark.parametrize(
    ("name", "files", "crossings"), PLANTED, ids=[f"{n}-{row[0]}" for n, row in enumerate(PLANTED)]
)
def test_a_planted_crossing_is_reported(name, files, crossings, tmp_path):
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text, encoding="utf-8")
    assert RULES[name](read(tmp_path)) == crossings


def test_every_rule_has_a_planted_crossing():
    assert {name for name, _, crossings in PLANTED if crossings} == RULES.keys()
