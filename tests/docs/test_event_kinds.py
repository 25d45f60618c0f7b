"""``ckpt.events.KINDS`` lists the event kinds that the package emits, no more and no fewer."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import ckpt
from ckpt.events import KINDS

PACKAGE = Path(ckpt.__file__).parent
KIND = re.compile(r"[a-z]+(-[a-z]+)*")


def is_event(call: ast.Call) -> bool:
    """Whether a call makes an ``Event``, by its plain name or as ``events.Event``."""
    function = call.func
    return (isinstance(function, ast.Name) and function.id == "Event") or (
        isinstance(function, ast.Attribute)
        and function.attr == "Event"
        and isinstance(function.value, ast.Name)
        and function.value.id == "events"
    )


def calls(node: ast.AST) -> Iterator[ast.Call]:
    for inner in ast.walk(node):
        if isinstance(inner, ast.Call) and inner.args:
            yield inner


def literals(node: ast.expr) -> set[str]:
    """The strings that an argument may be: a literal, or either branch of a conditional."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return {node.value}
    if isinstance(node, ast.IfExp):
        return literals(node.body) | literals(node.orelse)
    return set()


def forwarders(tree: ast.AST) -> set[str]:
    """Functions that take a kind as their first argument and make an event of it."""
    found = set()
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            names = [argument.arg for argument in function.args.args if argument.arg != "self"]
            for call in calls(function):
                first = call.args[0]
                if is_event(call) and isinstance(first, ast.Name) and names[:1] == [first.id]:
                    found.add(function.name)
    return found


def name_of(call: ast.Call) -> str:
    function = call.func
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


@functools.cache
def texts() -> dict[Path, str]:
    return {path: path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}


@functools.cache
def makers() -> dict[Path, ast.Module]:
    """The syntax trees of the modules that make events."""
    return {path: ast.parse(text) for path, text in texts().items() if "Event(" in text}


def emitted() -> set[str]:
    helpers = {name for tree in makers().values() for name in forwarders(tree)}
    calls_helper = re.compile(rf"\b({'|'.join(helpers)})\(")
    kinds = set()
    for path, text in texts().items():
        if path in makers() or calls_helper.search(text):
            for call in calls(makers().get(path) or ast.parse(text)):
                # Another function may have a helper's name; its argument is rarely like a kind.
                found = literals(call.args[0])
                if name_of(call) in helpers:
                    kinds |= {kind for kind in found if KIND.fullmatch(kind)}
                elif is_event(call):
                    kinds |= found
    return kinds


def test_each_emitted_kind_is_listed_and_each_listed_one_is_emitted() -> None:
    kinds = emitted()
    assert kinds - KINDS.keys() == set()
    assert KINDS.keys() - kinds == set()


def test_every_event_has_a_literal_kind() -> None:
    """Or that of its function's first parameter; otherwise the test above would miss it."""
    for path, tree in makers().items():
        names = forwarders(tree)
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef) and function.name not in names:
                for call in calls(function):
                    if is_event(call):
                        assert literals(call.args[0]), f"{path}:{call.lineno}"


def test_kinds_are_kebab_case_and_explained() -> None:
    for kind, meaning in KINDS.items():
        assert KIND.fullmatch(kind)
        assert meaning
