"""Put a mutant where the right code was: into live functions, or in place of an import."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

from mutants import Mutant


def patch(module: ModuleType, mutant: Mutant) -> bool:
    """Give the live function of ``mutant`` the mutant's code and defaults. Whoever imported it has
    them then.

    Returns whether there is such a function.
    """
    aside: dict[str, Any] = {"__name__": module.__name__}
    exec(compile(mutant.source, "<mutant>", "exec", dont_inherit=True), aside)  # noqa: S102
    right, wrong = _function(vars(module), mutant.function), _function(aside, mutant.function)
    if right is None or wrong is None or right.__code__.co_freevars != wrong.__code__.co_freevars:
        return False
    right.__code__, right.__defaults__, right.__kwdefaults__ = (
        wrong.__code__,
        wrong.__defaults__,
        wrong.__kwdefaults__,
    )
    return True


def entry_of(module: ModuleType, mutant: Mutant) -> int:
    """The line where the live function of ``mutant`` begins; 0 where there is none."""
    right = _function(vars(module), mutant.function)
    return right.__code__.co_firstlineno if right else 0


@contextmanager
def entered(module: ModuleType) -> Iterator[set[int]]:
    """The lines of those functions of ``module`` that are entered meanwhile, by any thread that
    begins meanwhile too."""
    lines: set[int] = set()

    def note(frame: FrameType, event: str, arg: object) -> None:
        if event == "call" and frame.f_code.co_filename == module.__file__:
            lines.add(frame.f_code.co_firstlineno)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield lines
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def _function(names: dict[str, Any], dotted: str) -> FunctionType | None:
    """The function that stands there, out of its property or class method; of nested ones the
    outermost, whose code holds theirs."""
    for name in dotted.split("."):
        found = names[name]
        if isinstance(found, property):
            found = found.fget
        elif isinstance(found, (classmethod, staticmethod)):
            found = found.__func__
        if isinstance(found, FunctionType):
            return found
        names = dict(vars(found))
    return None


class Imported(importlib.abc.MetaPathFinder):
    """Answers the import of one module with a mutant. ``executed``: it was imported."""

    def __init__(self, module: str, path: Path, source: str) -> None:
        self._module = module
        self._loader = _Loader(module, str(path))
        self._loader.mutant = source

    @property
    def executed(self) -> bool:
        """Whether somebody imported it."""
        return self._loader.executed

    def find_spec(self, name: str, path: object = None, target: ModuleType | None = None) -> Any:
        """See importlib."""
        if name != self._module:
            return None
        return importlib.util.spec_from_file_location(name, self._loader.path, loader=self._loader)


class _Loader(importlib.machinery.SourceFileLoader):
    mutant = ""
    executed = False

    def get_code(self, fullname: str) -> CodeType:
        self.executed = True
        return compile(self.mutant, self.path, "exec", dont_inherit=True)
