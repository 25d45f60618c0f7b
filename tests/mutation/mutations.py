"""What a person in a hurry might write instead: for a place in a syntax tree, what to put there.
Pure.

What only repeats another change is left out: a comparison becomes True and False, which is harder
to survive than its negation.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

BOUNDARIES: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
}
NEGATIONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
}
TWINS = {
    "max": "min",
    "min": "max",
    "any": "all",
    "all": "any",
    "startswith": "endswith",
    "popleft": "pop",
}
WRAPPERS = {"sorted", "reversed", "set", "frozenset", "abs"}
EMPTY = {
    "str": "''",
    "int": "0",
    "bytes": "b''",
    "tuple": "()",
    "list": "[]",
    "dict": "{}",
    "frozenset": "frozenset()",
}
WITH_DEFAULT = {"get", "pop", "next", "getattr"}
Place = tuple[ast.AST, str, int | None]
"""Where a node hangs: its parent, the field there, and the index where that is a list."""

Wrong = ast.AST | list[ast.keyword] | None
"""What is put at a place; keywords at once, for a list that gets shorter."""


def signatures_of(tree: ast.Module) -> Iterator[tuple[str, list[str]]]:
    """What the module's own functions and classes say of their arguments' types: only those of one
    type are swapped."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield (
                node.name,
                [ast.unparse(arg.annotation) if arg.annotation else "" for arg in node.args.args],
            )
        elif isinstance(node, ast.ClassDef):
            fields = [
                ast.unparse(one.annotation) for one in node.body if isinstance(one, ast.AnnAssign)
            ]
            made = [
                one
                for one in node.body
                if isinstance(one, ast.FunctionDef) and one.name == "__init__"
            ]
            args = [
                ast.unparse(arg.annotation) if arg.annotation else ""
                for one in made
                for arg in one.args.args[1:]
            ]
            yield node.name, args or fields


def variants(
    node: ast.AST, parents: dict[ast.AST, Place], signatures: dict[str, list[str]]
) -> Iterator[tuple[Place, Wrong]]:
    """What may stand where: places in or at ``node``, and what is put there instead."""
    here = parents[node]
    if isinstance(node, ast.stmt):
        yield from _in_statements(node, here, parents)
    elif isinstance(node, ast.match_case):
        yield (node, "guard", None), ast.Constant(False)
    else:
        if _is_condition(here):
            yield here, ast.Constant(True)
            yield here, ast.Constant(False)
        yield from _in_expressions(node, here, signatures)


def _in_statements(
    node: ast.stmt, here: Place, parents: dict[ast.AST, Place]
) -> Iterator[tuple[Place, Wrong]]:
    yield from ((here, wrong) for wrong in _statements(node, parents))
    if isinstance(node, ast.For):
        yield (node, "iter", None), ast.Tuple([], ast.Load())
    if isinstance(node, ast.AugAssign) and (other := ARITHMETIC.get(type(node.op))):
        yield (node, "op", None), other()
    if isinstance(node, ast.Return) and node.value is not None:
        yield (node, "value", None), _nothing(node, parents)


def _in_expressions(
    node: ast.AST, here: Place, signatures: dict[str, list[str]]
) -> Iterator[tuple[Place, Wrong]]:
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
            call = here[0]
            assert isinstance(call, (ast.Call, ast.ClassDef))
            yield (call, "keywords", None), [one for one in call.keywords if one is not node]
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
    return (isinstance(parent, (ast.If, ast.While, ast.IfExp)) and name == "test") or name == "ifs"


def _is_unordered(place: Place) -> bool:
    """Whether the order of a tuple there means nothing: types, or where ``in`` looks."""
    parent, name, _ = place
    is_type = (
        isinstance(parent, ast.Call)
        and isinstance(parent.func, ast.Name)
        and parent.func.id == "isinstance"
    )
    return (
        is_type
        or isinstance(parent, (ast.Compare, ast.Subscript))
        or name in {"type", "annotation"}
    )


def _comparisons(node: ast.Compare, here: Place) -> Iterator[tuple[Place, ast.AST]]:
    for at, op in enumerate(node.ops):
        if other := BOUNDARIES.get(type(op)):
            yield (node, "ops", at), other()
    if len(node.ops) > 1:
        for first, last in ((0, -1), (1, None)):
            left = ([node.left, *node.comparators])[first]
            yield here, ast.Compare(left, node.ops[first:last], node.comparators[first:last])
    if not isinstance(
        here[0], ast.BoolOp
    ):  # where dropping the operand, and the whole as True or False, say as much
        yield here, ast.Constant(True)
        yield here, ast.Constant(False)
    elif other := NEGATIONS.get(type(node.ops[0])):
        yield (node, "ops", 0), other()


def _sums(node: ast.BinOp) -> Iterator[ast.AST]:
    if any(
        isinstance(side, (ast.Tuple, ast.List, ast.Constant, ast.JoinedStr))
        and not _is_number(side)
        for side in (node.left, node.right)
    ):
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
        swapped = (
            ast.Name(other, ast.Load())
            if isinstance(node.func, ast.Name)
            else _renamed(node.func, other)
        )
        yield ast.Call(swapped, node.args, node.keywords)
    if name in WRAPPERS and len(node.args) == 1:
        yield node.args[0]
    if name in WITH_DEFAULT and len(node.args) > 1 and not node.keywords:
        yield ast.Call(node.func, node.args[:-1], [])
    kinds = signatures.get(name, [])
    for at in range(len(node.args) - 1):
        if name not in {"isinstance", *TWINS} and len(set(kinds[at : at + 2])) < 2:
            yield ast.Call(node.func, _swapped(node.args, at), node.keywords)


def _renamed(node: ast.expr, name: str) -> ast.Attribute:
    assert isinstance(node, ast.Attribute)
    return ast.Attribute(node.value, name, node.ctx)


def _swapped(nodes: list[ast.expr], at: int) -> list[ast.expr]:
    return [*nodes[:at], nodes[at + 1], nodes[at], *nodes[at + 2 :]]


def _statements(node: ast.stmt, parents: dict[ast.AST, Place]) -> Iterator[ast.AST]:
    """What a whole statement is replaced by: nothing, mostly. Not where its names would then be
    unknown."""
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


def function_of(node: ast.AST, parents: dict[ast.AST, Place]) -> ast.AST:
    """The function that ``node`` is in, the innermost; the module where there is none."""
    while node in parents and not isinstance(node, ast.FunctionDef):
        node = parents[node][0]
    return node


def _bound(name: str, node: ast.AST, parents: dict[ast.AST, Place]) -> int:
    inside = ast.walk(function_of(node, parents))
    return sum(
        (isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store) and one.id == name)
        or (isinstance(one, ast.arg) and one.arg == name)
        for one in inside
    )


def _nothing(node: ast.AST, parents: dict[ast.AST, Place]) -> ast.expr:
    """The emptiest value of the type that the function says it returns."""
    function = function_of(node, parents)
    assert isinstance(function, ast.FunctionDef)
    kind = ast.unparse(function.returns) if function.returns else "None"
    text = "None" if "None" in kind else EMPTY.get(kind.partition("[")[0], "None")
    return ast.parse(text, mode="eval").body
