"""Small wrong changes to one module's source, each as a person in a hurry might make it. Pure: source in, mutants out.

What only repeats another mutant is left out: a comparison is replaced by True and by False, which is harder to survive than its
negation. Left alone are types, decorators, docstrings, asserts and the words of messages.
"""

from __future__ import annotations

import ast
import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

BOUNDARIES: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
}  # fmt: skip
NEGATIONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
}  # fmt: skip
TWINS = {"max": "min", "min": "max", "any": "all", "all": "any", "startswith": "endswith", "popleft": "pop"}
WRAPPERS = {"sorted", "reversed", "set", "frozenset", "abs"}
EMPTY = {"str": "''", "int": "0", "bytes": "b''", "tuple": "()", "list": "[]", "dict": "{}", "frozenset": "frozenset()"}
WITH_DEFAULT = {"get", "pop", "next", "getattr"}
TEXT_MIN = 12
"""A mutation is shown with so much around it that this many characters are seen, or the statement."""

Place = tuple[ast.AST, str, int | None]
"""Where a node hangs: its parent, the field there, and the index where that is a list."""

Wrong = ast.AST | list[ast.keyword] | None
"""What is put at a place; keywords at once, for a list that gets shorter."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change: in which function, what was there, what is there now, and the whole module with it.

    ``number`` tells apart mutants of one function that read alike, from 1. ``on_import``: it is in what only an import runs.
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
    parents = {child: (node, name, at) for node in ast.walk(tree) for child, name, at in _children(node)}
    signatures = dict(_signatures(tree))
    found: list[Mutant] = []
    known = {ast.unparse(tree)}
    seen: Counter[tuple[str, str, str]] = Counter()
    for node, function in list(_nodes(tree, "")):
        for place, wrong in list(_variants(node, parents, signatures)):
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
            on_import = not isinstance(_function(node, parents), ast.FunctionDef)
            found.append(Mutant(*key, seen[key], getattr(node, "lineno", 0), on_import, mutated))
    return sorted(found, key=lambda one: one.line)


def _children(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None]]:
    for name, value in ast.iter_fields(node):
        if isinstance(value, ast.AST):
            yield value, name, None
        elif isinstance(value, list):
            yield from ((one, name, at) for at, one in enumerate(value) if isinstance(one, ast.AST))


def _nodes(node: ast.AST, function: str) -> Iterator[tuple[ast.AST, str]]:
    """Every node that may be changed, with the dotted name of the function or class that it is in."""
    for child, name, _ in _children(node):
        if name in {"annotation", "returns", "decorator_list", "bases", "pattern", "type"}:
            continue
        if isinstance(child, (ast.Import, ast.ImportFrom, ast.Assert, ast.JoinedStr, ast.expr_context)):
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
    return bool(names & {"__all__", "__slots__"}) or bool(kinds) and (union or isinstance(statement.value, ast.Subscript))


def _signatures(tree: ast.Module) -> Iterator[tuple[str, list[str]]]:
    """What the module's own functions and classes say of their arguments' types: only those of one type are swapped."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, [ast.unparse(arg.annotation) if arg.annotation else "" for arg in node.args.args]
        elif isinstance(node, ast.ClassDef):
            fields = [ast.unparse(one.annotation) for one in node.body if isinstance(one, ast.AnnAssign)]
            made = [one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"]
            args = [ast.unparse(arg.annotation) if arg.annotation else "" for one in made for arg in one.args.args[1:]]
            yield node.name, args or fields


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
        len(ast.unparse(node)) < TEXT_MIN or isinstance(node, (ast.keyword, ast.comprehension, ast.arguments))
    ):
        node = parents[node][0]
    return node


class _Brief(ast.NodeTransformer):
    """Messages as three dots: they are long, and nothing in them is changed."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:  # noqa: N802
        return ast.Name("...", ast.Load())


def _text(node: ast.AST) -> str:
    lines = ast.unparse(ast.fix_missing_locations(_Brief().visit(copy.deepcopy(node)))).strip().splitlines()
    return lines[0] if isinstance(node, (ast.stmt, ast.match_case)) else " ".join(line.strip() for line in lines)


def _variants(
    node: ast.AST, parents: dict[ast.AST, Place], signatures: dict[str, list[str]]
) -> Iterator[tuple[Place, Wrong]]:
    """What may stand where: places in or at ``node``, and what is put there instead."""
    here = parents[node]
    if isinstance(node, ast.stmt):
        yield from ((here, wrong) for wrong in _statements(node, parents))
        if isinstance(node, ast.For):
            yield (node, "iter", None), ast.Tuple([], ast.Load())
        if isinstance(node, ast.AugAssign) and (other := ARITHMETIC.get(type(node.op))):
            yield (node, "op", None), other()
        if isinstance(node, ast.Return) and node.value is not None:
            yield (node, "value", None), _nothing(node, parents)
        return
    if isinstance(node, ast.match_case):
        yield (node, "guard", None), ast.Constant(False)
        return
    if _is_condition(here):
        yield here, ast.Constant(True)
        yield here, ast.Constant(False)
    match node:
        case ast.Compare():
            yield from _comparisons(node, here)
        case ast.BoolOp():
            yield (node, "op", None), ast.And() if isinstance(node.op, ast.Or) else ast.Or()
            for at in range(len(node.values)):
                rest = node.values[:at] + node.values[at + 1 :]
                yield here, rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield here, operand
        case ast.BinOp():
            yield from ((here, wrong) for wrong in _sums(node))
        case ast.Constant() if not (isinstance(here[0], ast.keyword) and here[0].arg == "strict"):
            yield from ((here, ast.Constant(wrong)) for wrong in _constants(node.value))
        case ast.keyword(arg=name) if name != "strict":  # which is an assert of its own
            yield (here[0], "keywords", None), [one for one in here[0].keywords if one is not node]
        case ast.Call():
            yield from ((here, wrong) for wrong in _calls(node, signatures))
        case ast.Slice():
            for name in ("lower", "upper"):
                if (bound := getattr(node, name)) is not None:
                    yield (node, name, None), None
                    yield (node, name, None), ast.BinOp(bound, ast.Add(), ast.Constant(1))
        case ast.Tuple(elts=elements, ctx=ast.Load()) if not _is_unordered(here):
            for at in range(len(elements) - 1):
                yield here, ast.Tuple(_swapped(elements, at), ast.Load())


def _is_condition(place: Place) -> bool:
    parent, name, _ = place
    return isinstance(parent, (ast.If, ast.While, ast.IfExp)) and name == "test" or name == "ifs"


def _is_unordered(place: Place) -> bool:
    """Whether the order of a tuple there means nothing: types, or where ``in`` looks."""
    parent, name, _ = place
    is_type = isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name) and parent.func.id == "isinstance"
    return is_type or isinstance(parent, (ast.Compare, ast.Subscript)) or name in {"type", "annotation"}


def _comparisons(node: ast.Compare, here: Place) -> Iterator[tuple[Place, ast.AST]]:
    for at, op in enumerate(node.ops):
        if other := BOUNDARIES.get(type(op)):
            yield (node, "ops", at), other()
    if len(node.ops) > 1:
        for first, last in ((0, -1), (1, None)):
            left = ([node.left, *node.comparators])[first]
            yield here, ast.Compare(left, node.ops[first:last], node.comparators[first:last])
    if not isinstance(here[0], ast.BoolOp):  # where dropping the operand, and the whole as True or False, say as much
        yield here, ast.Constant(True)
        yield here, ast.Constant(False)
    elif other := NEGATIONS.get(type(node.ops[0])):
        yield (node, "ops", 0), other()


def _sums(node: ast.BinOp) -> Iterator[ast.AST]:
    if any(isinstance(side, (ast.Tuple, ast.List, ast.Constant, ast.JoinedStr)) and not _is_number(side)
           for side in (node.left, node.right)):  # fmt: skip
        yield node.left
        yield node.right
    elif other := ARITHMETIC.get(type(node.op)):
        yield ast.BinOp(node.left, other(), node.right)
        if isinstance(node.op, (ast.Add, ast.Sub, ast.BitOr, ast.BitAnd)):
            yield node.left


def _is_number(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, (int, float))


def _constants(value: object) -> Iterator[bool | int | float | str]:
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, (int, float)):
        yield value + 1
        yield value - 1
    elif isinstance(value, str):
        yield "" if value else "x"


def _calls(node: ast.Call, signatures: dict[str, list[str]]) -> Iterator[ast.AST]:
    match node.func:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            pass
        case _:
            name = ""
    if other := TWINS.get(name):
        swapped = ast.Name(other, ast.Load()) if isinstance(node.func, ast.Name) else replace_attr(node.func, other)
        yield ast.Call(swapped, node.args, node.keywords)
    if name in WRAPPERS and len(node.args) == 1:
        yield node.args[0]
    if name in WITH_DEFAULT and len(node.args) > 1 and not node.keywords:
        yield ast.Call(node.func, node.args[:-1], [])
    kinds = signatures.get(name, [])
    for at in range(len(node.args) - 1):
        if name not in {"isinstance", *TWINS} and len(set(kinds[at : at + 2])) < 2:
            yield ast.Call(node.func, _swapped(node.args, at), node.keywords)


def replace_attr(node: ast.expr, name: str) -> ast.Attribute:
    """The same attribute access with another name."""
    assert isinstance(node, ast.Attribute)
    return ast.Attribute(node.value, name, node.ctx)


def _swapped(nodes: list[ast.expr], at: int) -> list[ast.expr]:
    return [*nodes[:at], nodes[at + 1], nodes[at], *nodes[at + 2 :]]


def _statements(node: ast.stmt, parents: dict[ast.AST, Place]) -> Iterator[ast.AST]:
    """What a whole statement is replaced by: nothing, mostly. Not where its names would then be unknown."""
    match node:
        case ast.Expr() | ast.AugAssign() | ast.Delete() | ast.Raise():
            yield ast.Pass()
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield ast.Pass()
        case ast.Assign(targets=[ast.Name(id=name)]) if _bound(name, node, parents) > 1:
            yield ast.Pass()
        case ast.Break():
            yield ast.Continue()
            yield ast.Pass()
        case ast.Continue():
            yield ast.Break()
            yield ast.Pass()


def _function(node: ast.AST, parents: dict[ast.AST, Place]) -> ast.AST:
    while node in parents and not isinstance(node, ast.FunctionDef):
        node = parents[node][0]
    return node


def _bound(name: str, node: ast.AST, parents: dict[ast.AST, Place]) -> int:
    inside = ast.walk(_function(node, parents))
    return sum(
        (isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store) and one.id == name)
        or (isinstance(one, ast.arg) and one.arg == name)
        for one in inside
    )


def _nothing(node: ast.AST, parents: dict[ast.AST, Place]) -> ast.expr:
    """The emptiest value of the type that the function says it returns."""
    function = _function(node, parents)
    assert isinstance(function, ast.FunctionDef)
    kind = ast.unparse(function.returns) if function.returns else "None"
    text = "None" if "None" in kind else EMPTY.get(kind.partition("[")[0], "None")
    return ast.parse(text, mode="eval").body
