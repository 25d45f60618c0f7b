"""Every small wrong change to one module's source. Pure: source in, mutants out.

Left alone are types, decorators, docstrings, asserts and the words of messages.
"""

from __future__ import annotations

import ast
import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from mutations import Place, Wrong, function_of, signatures_of, variants

TEXT_MIN = 12
"""A mutation is shown with so much around it that this many characters are seen, or the
statement."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change: in which function, what was there, what is there now, and the whole module with
    it.

    ``number`` tells apart mutants of one function that read alike, from 1. ``on_import``: it is in
    what only an import runs.
    """

    function: str
    before: str
    after: str
    number: int
    line: int
    on_import: bool
    source: str

    @property
    def name(self) -> str:
        """How reports and the list of equal ones name it."""
        return f"{self.before} → {self.after}" + (f" #{self.number}" if self.number > 1 else "")


def mutants_of(source: str) -> list[Mutant]:
    """Every mutant of a module, in the order of its lines. O(nodes x length of the source)."""
    tree = ast.parse(source)
    parents = {
        child: (node, name, at) for node in ast.walk(tree) for child, name, at in _children(node)
    }
    signatures = dict(signatures_of(tree))
    found: list[Mutant] = []
    known = {ast.unparse(tree)}
    seen: Counter[tuple[str, str, str]] = Counter()
    for node, function in list(_nodes(tree, "")):
        for place, wrong in list(variants(node, parents, signatures)):
            shown = _shown(node, parents)
            before = _text(shown)
            right = _swap(place, wrong)
            mutated = ast.unparse(ast.fix_missing_locations(tree))
            after = _text(shown if shown is not node or place[0] is node else wrong)
            _swap(place, right)
            if isinstance(node, ast.keyword):
                before, after = _text(node), "nothing"
            elif isinstance(shown, ast.FunctionDef) and isinstance(wrong, ast.AST):
                before, after = f"default {_text(node)}", f"default {_text(wrong)}"
            if mutated in known:
                continue
            known.add(mutated)
            seen[key := (function, before, after)] += 1
            on_import = not isinstance(function_of(node, parents), ast.FunctionDef)
            found.append(Mutant(*key, seen[key], getattr(node, "lineno", 0), on_import, mutated))
    return sorted(found, key=lambda one: one.line)


def _children(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None]]:
    for name, value in ast.iter_fields(node):
        if isinstance(value, ast.AST):
            yield value, name, None
        elif isinstance(value, list):
            yield from ((one, name, at) for at, one in enumerate(value) if isinstance(one, ast.AST))


def _nodes(node: ast.AST, function: str) -> Iterator[tuple[ast.AST, str]]:
    """Every node that may be changed, with the dotted name of the function or class that it is
    in."""
    for child, name, _ in _children(node):
        if name in {"annotation", "returns", "decorator_list", "bases", "pattern", "type"}:
            continue
        if isinstance(
            child, (ast.Import, ast.ImportFrom, ast.Assert, ast.JoinedStr, ast.expr_context)
        ):
            continue
        if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
            continue
        if isinstance(child, ast.Assign) and _is_declaration(child):
            continue
        inner = function
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
            inner = f"{function}.{child.name}".lstrip(".")
        yield child, inner
        yield from _nodes(child, inner)


def _is_declaration(statement: ast.Assign) -> bool:
    """Whether an assignment names types, exports or slots."""
    names = {target.id for target in statement.targets if isinstance(target, ast.Name)}
    union = isinstance(statement.value, ast.BinOp) and isinstance(statement.value.op, ast.BitOr)
    kinds = {name for name in names if name[0].isupper() and not name.isupper()}
    return bool(names & {"__all__", "__slots__"}) or (
        bool(kinds) and (union or isinstance(statement.value, ast.Subscript))
    )


def _swap(place: Place, new: Wrong) -> Wrong:
    """Put ``new`` there. Returns what was there."""
    parent, name, at = place
    old: Wrong
    if at is None:
        old = getattr(parent, name)
        setattr(parent, name, new)
    else:
        old, getattr(parent, name)[at] = getattr(parent, name)[at], new
    return old


def _shown(node: ast.AST, parents: dict[ast.AST, Place]) -> ast.AST:
    while not isinstance(node, (ast.stmt, ast.match_case)) and (
        len(ast.unparse(node)) < TEXT_MIN
        or isinstance(node, (ast.keyword, ast.comprehension, ast.arguments))
    ):
        node = parents[node][0]
    return node


class _Brief(ast.NodeTransformer):
    """Messages as three dots: they are long, and nothing in them is changed."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        return ast.Name("...", ast.Load())


def _text(node: Wrong) -> str:
    assert isinstance(node, ast.AST)
    lines = (
        ast.unparse(ast.fix_missing_locations(_Brief().visit(copy.deepcopy(node))))
        .strip()
        .splitlines()
    )
    return (
        lines[0]
        if isinstance(node, (ast.stmt, ast.match_case))
        else " ".join(line.strip() for line in lines)
    )
