"""Mutants are what a person might write by mistake: each kind once, none twice, and nothing that no
test could see."""

from __future__ import annotations

import ast
import textwrap

import pytest
from mutants import mutants_of


def changes(source: str) -> set[str]:
    """The mutants of a function's body, as reports name them."""
    return {one.name for one in mutants_of(textwrap.dedent(source))}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        (
            "return alpha < omega",
            {"alpha < omega → alpha <= omega", "alpha < omega → True", "alpha < omega → False"},
        ),
        ("return alpha == omega", {"alpha == omega → True", "alpha == omega → False"}),
        (
            "return lower <= value < upper",
            {"lower <= value < upper → value < upper", "lower <= value < upper → lower <= value"},
        ),
        ("return alpha and omega", {"alpha and omega → alpha or omega", "alpha and omega → alpha"}),
        ("return not alphabet", {"not alphabet → alphabet"}),
        (
            "return alphabet + 1",
            {
                "alphabet + 1 → alphabet + 2",
                "alphabet + 1 → alphabet - 1",
                "alphabet + 1 → alphabet",
            },
        ),
        ("return max(alphabet)", {"max(alphabet) → min(alphabet)"}),
        ("return any(alphabet)", {"any(alphabet) → all(alphabet)"}),
        ("return sorted(alphabet)", {"sorted(alphabet) → alphabet"}),
        ("return alphabet[2:]", {"alphabet[2:] → alphabet[:]", "alphabet[2:] → alphabet[3:]"}),
        ("return alpha, omega", {"(alpha, omega) → (omega, alpha)"}),
        ("return call(alpha, omega)", {"call(alpha, omega) → call(omega, alpha)"}),
        ("return call(key=alphabet)", {"key=alphabet → nothing"}),
        ("return table.get(alpha, omega)", {"table.get(alpha, omega) → table.get(alpha)"}),
        ("call(alphabet)", {"call(alphabet) → pass"}),
        ("alphabet.entry = 1", {"alphabet.entry = 1 → pass"}),
        ("raise alphabet", {"raise alphabet → pass"}),
        ("if alphabet:\n    call()", {"if alphabet: → if True:", "if alphabet: → if False:"}),
        (
            "for one in alphabet:\n    continue",
            {"for one in alphabet: → for one in ():", "continue → break"},
        ),
        ("return True", {"return True → return None", "return True → return False"}),
        ("return 'alphabet'", {"return 'alphabet' → return ''"}),
        ("match alpha:\n    case 1:\n        pass", {"case 1: → case 1 if False:"}),
    ],
)
def test_each_kind_of_mistake_is_made(source: str, found: set[str]) -> None:
    body = textwrap.indent(source, "    ")
    assert found <= changes(
        f"def function(alpha, omega, alphabet, lower, value, upper, table):\n{body}\n"
    )


def test_types_messages_asserts_and_declarations_are_left_alone() -> None:
    assert changes('''
        """Words."""
        import os
        Kind = int | str
        __all__ = ["a"]
        def function(alpha: dict[str, int] = None) -> int:
            """Words."""
            assert alpha
            number: list[int]
            isinstance(alpha, (int, str))
    ''') == {"isinstance(alpha, (int, str)) → pass"}


def test_what_a_function_returns_is_emptied_as_its_type_says() -> None:
    for kind, empty in (
        ("int", "0"),
        ("str", "''"),
        ("tuple[int, ...]", "()"),
        ("int | None", "None"),
        ("Thing", "None"),
    ):
        assert f"return make() → return {empty}" in changes(
            f"def function() -> {kind}:\n    return make()\n"
        )


def test_arguments_of_a_known_function_are_swapped_only_where_their_types_are_the_same() -> None:
    source = "def known(a: int, b: int, c: str): pass\ndef function():\n    return known(alpha, omega, text)\n"
    found = {one for one in changes(source) if one.startswith("known")}
    assert found == {"known(alpha, omega, text) → known(omega, alpha, text)"}


def test_mutants_are_valid_different_and_told_apart() -> None:
    source = "def function(alpha):\n    if alpha == 1:\n        return alpha == 1\n    return 2\n\n\nLIMIT = 3\n"
    found = mutants_of(source)
    assert (
        len({one.source for one in found})
        == len(found)
        == len({(one.function, one.name) for one in found})
    )
    assert all(
        ast.unparse(ast.parse(one.source)) != ast.unparse(ast.parse(source)) for one in found
    )
    assert {one.function for one in found if not one.on_import} == {"function"}
    assert {one.name for one in found if one.on_import} == {
        "LIMIT = 3 → LIMIT = 4",
        "LIMIT = 3 → LIMIT = 2",
    }
    assert mutants_of(source) == found
