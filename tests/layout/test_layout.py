"""What keeps the house in order: each rule of CONTRIBUTING.md that a machine can check.

A budget is the number measured when the rule was written. It may fall and never rise: whoever gets
below it lowers it.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "ckpt"

SINGLE_IMPORTER_MAX = 44
"""Modules with one importer that are neither pure nor imported lazily."""

WITHOUT_TESTS_MAX = 111
"""Modules that no test file is named after; what they do is tested elsewhere."""

FOLDER_MODULES_MAX = 15
CROWDED = {"ckpt/cli/commands"}
"""Folders that may hold more: one file a command, named as the command."""

METHODS_MAX = 20
ATTRIBUTES_MAX = 12
LARGE_CLASSES_MAX = 26
"""Classes over one of both limits."""

IMPURE = frozenset(
    {
        "asyncio",
        "concurrent",
        "etcd3",
        "fcntl",
        "fsspec",
        "grpc",
        "io",
        "mmap",
        "multiprocessing",
        "obstore",
        "os",
        "pathlib",
        "random",
        "s3fs",
        "secrets",
        "select",
        "selectors",
        "shutil",
        "socket",
        "subprocess",
        "tempfile",
        "threading",
        "time",
        "torch",
        "uuid",
    }
)
"""What a module that only decides can't import: I/O, clocks, randomness, threads and the
environment."""


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the package by its dotted name."""
    return {_dotted(path): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def _dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _file(module: str) -> str:
    path = ROOT.joinpath(*module.split("."))
    return (
        f"{path.relative_to(ROOT)}/__init__.py" if path.is_dir() else f"{path.relative_to(ROOT)}.py"
    )


def _targets(node: ast.AST) -> Iterator[str]:
    """What one statement or call imports, as dotted names that may go on to a name inside a
    module."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _named(node: ast.AST) -> Iterator[str]:
    """A module named in text, as ``import_module`` and tables of lazily loaded modules do."""
    if (
        isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.fullmatch(r"ckpt(\.\w+)+", node.value)
    ):
        yield node.value


def _home(name: str) -> str | None:
    """The module of the package that a dotted name belongs to."""
    while name and name not in modules():
        name = name.rpartition(".")[0]
    return name if name.startswith("ckpt") else None


@cache
def imports(*, late: bool = True) -> dict[str, frozenset[str]]:
    """Which modules of the package each imports, also for types alone; ``late``: or names in text
    to be loaded later."""
    found: dict[str, frozenset[str]] = {}
    for module, tree in modules().items():
        names = [name for node in ast.walk(tree) for name in _targets(node)]
        if late:
            names += [name for node in ast.walk(tree) for name in _named(node)]
        found[module] = frozenset(
            home for name in names if (home := _home(name)) and home not in (module, "ckpt")
        )
    return found


def outside(module: str) -> set[str]:
    """The top-level packages outside ``ckpt`` that a module imports at run time."""
    tree = modules()[module]
    typing_only = {
        id(inner)
        for node in tree.body
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    names = (
        name for node in ast.walk(tree) if id(node) not in typing_only for name in _targets(node)
    )
    return {name.partition(".")[0] for name in names} - {"ckpt", "__future__"}


def says_pure(module: str) -> bool:
    text = ast.get_docstring(modules()[module]) or ""
    return text.partition("\n\n")[0].rstrip().endswith("Pure.")


def circles(graph: dict[str, frozenset[str]]) -> list[list[str]]:
    """The strongly connected components of more than one module (Tarjan's algorithm)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    rings: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            ring: list[str] = []
            while not ring or ring[-1] != node:
                ring.append(stack.pop())
            if len(ring) > 1:
                rings.append(sorted(ring))

    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(10_000)
    try:
        for node in sorted(graph):
            if node not in index:
                visit(node)
    finally:
        sys.setrecursionlimit(limit)
    return rings


def classes() -> Iterator[tuple[str, ast.ClassDef]]:
    for module, tree in modules().items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                yield module, node


def test_class_name_exists_once() -> None:
    homes: defaultdict[str, set[str]] = defaultdict(set)
    for module, node in classes():
        homes[node.name].add(_file(module))
    assert {name: sorted(files) for name, files in homes.items() if len(files) > 1} == {}


def test_no_circle_of_imports_also_for_types_and_late_ones() -> None:
    assert circles(imports()) == []


def test_module_that_says_pure_imports_nothing_impure() -> None:
    liars: dict[str, list[str]] = {}
    for module in filter(says_pure, modules()):
        seen, todo = {module}, [module]
        while todo:
            current = todo.pop()
            if wrong := outside(current) & (IMPURE | {"logging"} if current == module else IMPURE):
                liars.setdefault(module, []).append(f"{current}: {sorted(wrong)}")
            new = imports(late=False)[current] - seen
            seen |= new
            todo += new
    assert liars == {}


def test_modules_with_one_importer_are_few() -> None:
    importers: defaultdict[str, set[str]] = defaultdict(set)
    for module, targets in imports(late=False).items():
        for target in targets:
            importers[target].add(module)
    lazy = {
        name for module, names in imports().items() for name in names - imports(late=False)[module]
    }
    alone = [
        module
        for module, users in importers.items()
        if len(users) == 1
        and not says_pure(module)
        and module not in lazy
        and not _file(module).endswith("__init__.py")
    ]
    assert len(alone) <= SINGLE_IMPORTER_MAX, sorted(alone)


def test_folder_holds_at_most_so_many_modules() -> None:
    counts = Counter(
        str(Path(_file(module)).parent)
        for module in modules()
        if not _file(module).endswith("__init__.py")
    )
    assert {folder for folder, count in counts.items() if count > FOLDER_MODULES_MAX} <= CROWDED


def test_modules_without_a_test_file_of_their_name_are_few() -> None:
    alone: list[str] = []
    for module in modules():
        path = Path(_file(module))
        folder = ROOT / "tests" / path.parent.relative_to("ckpt")
        if not path.stem.startswith("__") and not [
            *folder.glob(f"test_{path.stem}.py"),
            *folder.glob(f"test_{path.stem}_*.py"),
        ]:
            alone.append(str(path))
    assert len(alone) <= WITHOUT_TESTS_MAX, alone


def test_files_with_one_prefix_are_a_subpackage() -> None:
    prefixes = Counter(
        (str(Path(_file(module)).parent), Path(_file(module)).stem.partition("_")[0])
        for module in modules()
        if not Path(_file(module)).stem.startswith("__")
    )
    assert [name for name, count in prefixes.items() if count > 2] == []


def test_classes_over_the_limits_are_few() -> None:
    large: list[str] = []
    for module, node in classes():
        methods = [
            inner
            for inner in node.body
            if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef)
            and not inner.name.startswith("_")
        ]
        attributes = {
            inner.attr
            for inner in ast.walk(node)
            if isinstance(inner, ast.Attribute)
            and isinstance(inner.ctx, ast.Store)
            and isinstance(inner.value, ast.Name)
            and inner.value.id == "self"
        }
        if len(methods) > METHODS_MAX or len(attributes) > ATTRIBUTES_MAX:
            large.append(
                f"{module}.{node.name}: {len(methods)} methods, {len(attributes)} attributes"
            )
    assert len(large) <= LARGE_CLASSES_MAX, large


@pytest.mark.parametrize("folder", ["ckpt", "tests", "benchmarks", "examples", "integrations"])
def test_formatter_decides(folder: str) -> None:
    mark = "fmt: " + "skip"
    assert [str(path) for path in (ROOT / folder).rglob("*.py") if mark in path.read_text()] == []


def test_installed_packages_are_those_that_exist() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    start = text.index("\npackages = [")
    listed = re.findall(r'"(ckpt[\w.]*)",', text[start : text.index("]\n", start)])
    there = {_dotted(path.parent / "__init__.py") for path in PACKAGE.rglob("__init__.py")} | {
        "ckpt.integrations"
    }
    assert sorted(listed) == sorted(there)


def _script_module(name: str) -> Path | None:
    """The file of a module that a benchmark or an example may import, if it is one of ours."""
    for root in (ROOT, ROOT / "benchmarks", ROOT / "examples", ROOT / "tests"):
        path = root.joinpath(*name.split("."))
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.exists():
                return file
    return None


def _bound(file: Path) -> set[str]:
    """Every name that a module binds anywhere at its top."""
    tree = ast.parse(file.read_text())
    bound = {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    for node in (inner for top in tree.body for inner in ast.walk(top)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.add(node.id)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            bound.add(node.value)  # names in a table of what is loaded late
    return bound


def _unresolved(script: Path) -> Iterator[str]:
    ours = {"ckpt", "kit", *(path.stem for path in (ROOT / "benchmarks").glob("*.py"))}
    outside = sys.stdlib_module_names | {*OUTSIDE}
    for node in ast.walk(ast.parse(script.read_text())):
        for name in _targets(node):
            module = node.module if isinstance(node, ast.ImportFrom) and node.module else name
            file = _script_module(module)
            if file is None:
                if module.partition(".")[0] in ours or module.partition(".")[0] not in outside:
                    yield f"{script.name}: {module}"
                continue
            bound = name.removeprefix(module).lstrip(".")
            if bound and bound not in _bound(file) and _script_module(name) is None:
                yield f"{script.name}: {name}"


OUTSIDE = (
    "aiohttp",
    "cryptography",
    "msgspec",
    "numpy",
    "obstore",
    "rich",
    "s3fs",
    "safetensors",
    "torch",
    "torchdata",
    "torchsnapshot",
    "xxhash",
    "zstandard",
)
"""Packages from outside that benchmarks and examples use."""


def test_benchmarks_and_examples_import_what_exists() -> None:
    scripts = [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "examples").rglob("*.py")]
    assert sorted(problem for script in scripts for problem in _unresolved(script)) == []
